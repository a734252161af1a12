"""The product in C++ (`quant/csrc/binary_gemv.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.binary_gemv import Packed, check, prepare
from quant.kernels.products import given_to, written_to

__all__ = ["binary_gemv", "prepare", "unavailable", "values"]

unavailable = partial(native.unavailable, "binary_gemv")


def binary_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    check(packed)
    made, given = written_to(x, packed.shape, out), given_to(x, packed.input_scale)
    sums = made if made.dtype is torch.float32 else torch.empty(made.shape, dtype=torch.float32)
    tensors = (packed.words.contiguous(), packed.tables.contiguous(), packed.salient.contiguous(), given, sums)
    native.call("binary_gemv", "bitgrid_binary_gemv", *tensors, *packed.shape, packed.block, x.shape[0], torch.get_num_threads())
    return made if sums is made else made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    check(packed)
    made = torch.empty(packed.shape)
    tensors = (packed.words.contiguous(), packed.tables.contiguous(), packed.salient.contiguous(), made)
    native.call("binary_gemv", "bitgrid_binary_values", *tensors, *packed.shape, packed.block, torch.get_num_threads())
    return made.to(dtype)
