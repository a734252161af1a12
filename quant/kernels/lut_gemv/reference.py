"""The weight is made and multiplied, in float64 unless said otherwise; any codebook tensor, any device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.kernels.lut_gemv import Packed
from quant.kernels.products import dense
from quant.tensors.codebook import CodebookTensor


def prepare(tensor: CodebookTensor) -> CodebookTensor:
    """Nothing is to be done."""
    return tensor


def lut_gemv(x: Tensor, packed: CodebookTensor | Packed, out: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[M, N]` in the type of x, rounded to it once from `dtype`, in which everything is computed."""
    weight = packed.values(dtype) if isinstance(packed, Packed) else replace(packed, input_scale=None).dequantize().to(dtype)
    return dense(x, weight, packed.input_scale, out)


def values(packed: CodebookTensor | Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = packed.values(torch.float32) if isinstance(packed, Packed) else replace(packed, input_scale=None).dequantize()
    return weight.to(dtype)
