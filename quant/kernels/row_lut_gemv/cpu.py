"""The product in C++ (`quant/csrc/row_lut_gemv.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.products import given_to, written_to
from quant.kernels.row_lut_gemv import Packed, prepare

__all__ = ["prepare", "row_lut_gemv", "unavailable", "values"]

unavailable = partial(native.unavailable, "row_lut_gemv")


def row_lut_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    made, given = written_to(x, packed.shape, out), given_to(x, packed.input_scale)
    sums = torch.zeros(made.shape)
    counts = (*packed.shape, packed.bits, x.shape[0], torch.get_num_threads())
    native.call("row_lut_gemv", "bitgrid_row_lut_gemv", packed.words.contiguous(), _tables(packed), given, sums, *counts)
    return made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.empty(packed.shape)
    counts = (*packed.shape, packed.bits, torch.get_num_threads())
    native.call("row_lut_gemv", "bitgrid_row_lut_values", packed.words.contiguous(), _tables(packed), made, *counts)
    return made.to(dtype)


def _tables(packed: Packed) -> Tensor:
    """In float32: a thousandth of what a call reads."""
    return packed.tables.float().contiguous()
