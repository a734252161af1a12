"""Steps in Triton; the grid, codes and packing by torch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.hqq_pack import MOST_POWER, Search, packed, steps, untouched
from quant.kernels.on_triton import unavailable
from quant.kernels.rtn_pack import reference as rtn

__all__ = ["hqq_pack", "unavailable", "zeros"]

BLOCK = 1024


def zeros(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, search: Search) -> tuple[Tensor, int]:
    from quant.kernels.hqq_pack.program import step as program

    if search.p >= MOST_POWER:
        made: tuple[Tensor, int] = kernel("hqq_pack", "reference", groups.device).run.zeros(groups, scale, zero, bits, search)
        return made
    moved, size = torch.empty_like(groups), torch.empty_like(groups)
    ranges = scale.contiguous()

    def step(zero: Tensor, beta: float) -> tuple[Tensor, float]:
        large = torch.zeros(1, dtype=torch.int32, device=groups.device)
        program[(-(-groups.numel() // BLOCK),)](
            groups, ranges, zero.contiguous(), moved, size, large, groups.numel(), groups.shape[-1], float(2**bits - 1),
            untouched(search.p, beta), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        if int(large):
            # Of these the power counts, whose last bits only torch knows: the record says that torch took the step.
            taken: tuple[Tensor, float] = kernel("hqq_pack", "reference", groups.device).run.step(groups, scale, bits, search.p, zero, beta)
            return taken
        return moved.mean(-1, keepdim=True), float(size.mean())

    return steps(step, zero, search)


hqq_pack = partial(packed, rtn, zeros)
