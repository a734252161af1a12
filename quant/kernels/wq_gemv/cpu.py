"""The product in C++ (`quant/csrc/wq_gemv.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.products import given_to, written_to
from quant.kernels.wq_gemv import Packed, prepare

__all__ = ["prepare", "unavailable", "values", "wq_gemv"]

unavailable = partial(native.unavailable, "wq_gemv")


def wq_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    made = written_to(x, packed.shape, out)
    words, ranges, given = packed.words.contiguous(), packed.ranges.contiguous(), given_to(x, packed.input_scale)
    sums = made if made.dtype is torch.float32 else torch.empty(made.shape, dtype=torch.float32)
    numbers = (*packed.shape, packed.groups, packed.bits, x.shape[0], torch.get_num_threads())
    native.call("wq_gemv", "bitgrid_wq_gemv", words, ranges, given, sums, *numbers)
    return made if sums is made else made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.empty(packed.shape)
    words, ranges = packed.words.contiguous(), packed.ranges.contiguous()
    native.call("wq_gemv", "bitgrid_wq_values", words, ranges, made, *packed.shape, packed.groups, packed.bits, torch.get_num_threads())
    return made.to(dtype)
