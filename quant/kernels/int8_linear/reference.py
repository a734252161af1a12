"""Both factors are made and multiplied in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.fake_quantize import reference
from quant.kernels.int8_linear import Packed, prepare

__all__ = ["int8_linear", "multiply", "prepare", "rounded"]


def rounded(x: Tensor, packed: Packed) -> Tensor:
    """float64 `[M, K]`."""
    made = reference.encode(x, packed.bits, packed.symmetric, packed.clip)
    return (made.codes.double() - made.zero.double()) * made.scale.double()


def multiply(values: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    zero = 0.0 if packed.zero is None else packed.zero.double()[:, None]
    weight = (packed.codes.double() - zero) * packed.scale.double()[:, None]
    return (values @ weight.T).float().to(dtype)


def int8_linear(x: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return multiply(rounded(x, packed), packed, dtype)
