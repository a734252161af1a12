"""The plain loop, column by column, as the paper's algorithm has it."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels.gptq_block import Fits, SolvedBlock, find_ranges


def solve_block(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None = None, fits: Fits | None = None
) -> SolvedBlock:
    if fits is not None:
        find_ranges(block, affine, group, fits)
    w = block.clone(memory_format=torch.contiguous_format)
    out = SolvedBlock.like(w) if out is None else out
    codes, values, errors = out.codes, out.values, out.errors
    for j in range(w.shape[0]):
        own = affine.of_group(group[j])
        code = own.encode(w[j])
        codes[j], values[j] = code, own.decode(code)
        errors[j] = (w[j] - values[j]) / upper[j, j]
        w[j:] -= torch.outer(upper[j, j:], errors[j])
    return out
