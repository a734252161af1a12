"""The weight is made and multiplied, in float64 unless said otherwise; any device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.kernels.products import dense
from quant.kernels.row_lut_gemv import Packed
from quant.tensors.row_codebook import RowCodebookTensor


def prepare(tensor: RowCodebookTensor) -> RowCodebookTensor:
    """Nothing is to be done."""
    return tensor


def row_lut_gemv(x: Tensor, packed: RowCodebookTensor | Packed, out: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[M, N]` in the type of x, rounded to it once from `dtype`, in which everything is computed."""
    return dense(x, values(packed, dtype), packed.input_scale, out)


def values(packed: RowCodebookTensor | Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return packed.values(dtype) if isinstance(packed, Packed) else replace(packed, input_scale=None).dequantize().to(dtype)
