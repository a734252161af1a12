"""The weight is made and multiplied, in float64 unless said otherwise; any binary tensor, any device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.kernels.binary_gemv import Packed
from quant.kernels.products import dense
from quant.tensors.binary import BinaryTensor


def prepare(tensor: BinaryTensor) -> BinaryTensor:
    """Nothing is to be done."""
    return tensor


def binary_gemv(x: Tensor, packed: BinaryTensor | Packed, out: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[M, N]` in the type of x, rounded to it once from `dtype`, in which everything is computed."""
    return dense(x, values(packed, dtype), packed.input_scale, out)


def values(packed: BinaryTensor | Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return packed.values(dtype) if isinstance(packed, Packed) else replace(packed, input_scale=None).dequantize().to(dtype)
