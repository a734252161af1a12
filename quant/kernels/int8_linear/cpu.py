"""The sums in C++ (`quant/csrc/int8_linear.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.int8_linear import Packed, prepare, rounded, scaled

__all__ = ["int8_linear", "multiply", "prepare", "rounded", "unavailable"]

unavailable = partial(native.unavailable, "int8_linear")


def multiply(rows: RowCodes, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    n, k = packed.codes.shape
    m = rows.codes.shape[0]
    sums = torch.empty(m, n, dtype=torch.int32)
    codes, weight = rows.codes.contiguous(), packed.codes.contiguous()
    native.call("int8_linear", "bitgrid_int8_sums", codes, weight, sums, n, k, m, torch.get_num_threads())
    return scaled(sums, rows, packed, dtype)


def int8_linear(x: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return multiply(rounded(x, packed), packed, dtype)
