"""The product in C++ (`quant/csrc/lut_gemv.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.lut_gemv import Packed, prepare, side_by_side
from quant.kernels.products import given_to, written_to

__all__ = ["lut_gemv", "prepare", "unavailable", "values"]

unavailable = partial(native.unavailable, "lut_gemv")


def lut_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    made, given = written_to(x, packed.shape, out), given_to(x, packed.input_scale)
    sums = torch.zeros(made.shape)
    n, k = packed.shape
    for part in side_by_side(packed):
        tensors = (part.words.contiguous(), part.values.contiguous(), part.columns.contiguous(), given, sums)
        native.call("lut_gemv", "bitgrid_lut_gemv", *tensors, n, len(part.columns), k, part.bits, x.shape[0], torch.get_num_threads())
    if packed.apart is not None:
        tensors = (packed.apart.starts.contiguous(), packed.apart.columns.contiguous(), packed.apart.differences.contiguous(), given, sums)
        native.call("lut_gemv", "bitgrid_lut_apart", *tensors, n, k, x.shape[0], torch.get_num_threads())
    return made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.empty(packed.shape)
    n, k = packed.shape
    for part in side_by_side(packed):
        tensors = (part.words.contiguous(), part.values.contiguous(), part.columns.contiguous(), made)
        native.call("lut_gemv", "bitgrid_lut_values", *tensors, n, len(part.columns), k, part.bits, torch.get_num_threads())
    return packed.with_apart(made).to(dtype)
