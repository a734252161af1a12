"""The weight is made and multiplied, in float64 unless said otherwise; any affine tensor, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.wq_gemm import Packed, given_out
from quant.tensors.affine import AffineTensor


def prepare(tensor: AffineTensor) -> AffineTensor:
    """Nothing is to be done."""
    return tensor


def wq_gemm(x: Tensor, packed: AffineTensor | Packed, out: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[M, N]` in the type of x, rounded to it once from `dtype`, in which everything is computed."""
    made = given_out(x, packed.shape, out)
    given = x.to(dtype)
    if packed.input_scale is not None:
        given = given / packed.input_scale.to(dtype)
    weight = packed.values(dtype) if isinstance(packed, Packed) else packed.decoded(dtype)
    return made.copy_(given @ weight.T)
