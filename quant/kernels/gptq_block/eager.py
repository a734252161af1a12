"""The loop in torch operations that write in place; any device."""

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
    by_group = {g: affine.of_group(g) for g in set(group)}
    # One transfer instead of one per column, where the factor lies on a GPU.
    diagonal: list[float] = upper.diagonal().tolist()
    for j in range(w.shape[0]):
        own = by_group[group[j]]
        code = own.encode(w[j])
        codes[j], values[j] = code, own.decode(code)
        torch.sub(w[j], values[j], out=errors[j]).div_(diagonal[j])
        w[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return out
