"""Steps in C++ (`quant/csrc/rtn_pack.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import kernel, native
from quant.kernels.hqq_pack import MOST_POWER, Search, packed, steps, untouched
from quant.kernels.rtn_pack import cpu as rtn

__all__ = ["hqq_pack", "unavailable", "zeros"]

unavailable = partial(native.unavailable, "rtn_pack")


def zeros(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, search: Search) -> tuple[Tensor, int]:
    if search.p >= MOST_POWER:
        made: tuple[Tensor, int] = kernel("hqq_pack", "reference").run.zeros(groups, scale, zero, bits, search)
        return made
    # Codes less w / scale, and |W - Ŵ|.
    moved, size = torch.empty_like(groups), torch.empty_like(groups)
    large = torch.empty(scale.numel(), dtype=torch.uint8)
    ranges = scale.contiguous()

    def step(zero: Tensor, beta: float) -> tuple[Tensor, float]:
        known = torch.tensor([untouched(search.p, beta)], dtype=torch.float32)
        sizes = (bits, groups.shape[-1], scale.numel(), torch.get_num_threads())
        native.call("rtn_pack", "bitgrid_hqq_step", groups, ranges, zero.contiguous(), moved, size, large, known, *sizes)
        if bool(large.any()):
            # Of these the power counts, whose last bits only torch knows: the record says that torch took the step.
            taken: tuple[Tensor, float] = kernel("hqq_pack", "reference").run.step(groups, scale, bits, search.p, zero, beta)
            return taken
        return moved.mean(-1, keepdim=True), float(size.mean())

    return steps(step, zero, search)


hqq_pack = partial(packed, rtn, zeros)
