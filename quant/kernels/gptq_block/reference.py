"""The plain loop, column by column, as the paper's algorithm has it."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels.gptq_block import SolvedBlock


def unavailable(device: torch.device) -> str | None:
    return None


def solve_block(block: Tensor, upper: Tensor, affine: Affine, group: list[int]) -> SolvedBlock:
    w = block.clone()
    codes, values, errors = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
    for j in range(w.shape[0]):
        own = Affine(affine.scale[group[j]], affine.zero[group[j]], affine.bits, affine.kind)
        codes[j] = own.encode(w[j])
        values[j] = own.decode(codes[j])
        errors[j] = (w[j] - values[j]) / upper[j, j]
        w[j:] -= torch.outer(upper[j, j:], errors[j])
    return SolvedBlock(codes, values, errors)
