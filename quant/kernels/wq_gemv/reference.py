"""The weight is made and multiplied, in float64 unless said otherwise; any affine tensor, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.products import dense
from quant.kernels.wq_gemv import Packed
from quant.tensors.affine import AffineTensor


def prepare(tensor: AffineTensor) -> AffineTensor:
    """Nothing is to be done."""
    return tensor


def wq_gemv(x: Tensor, packed: AffineTensor | Packed, out: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[M, N]` in the type of x, rounded to it once from `dtype`, in which everything is computed."""
    return dense(x, _made(packed, dtype), packed.input_scale, out)


def values(packed: AffineTensor | Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return _made(packed, torch.float32).to(dtype)


def _made(weight: AffineTensor | Packed, dtype: torch.dtype) -> Tensor:
    """`[N, K]`, before the input scale."""
    return weight.values(dtype) if isinstance(weight, Packed) else weight.decoded(dtype)
