"""Additions and subtractions of halves, k times, then a product with the small factor."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.hadamard.matrices import factors, small


def transform(x: Tensor, factor: float = 1.0, transpose: bool = False) -> Tensor:
    rows, n = x.shape
    m, width = factors(n)
    y = x if x.dtype in (torch.float32, torch.float64) else x.float()
    y = _sylvester(y.reshape(rows * m, width))
    if m > 1:
        y = torch.matmul(small(m, transpose, y.dtype, y.device), y.view(rows, m, width)).view(rows, n)
    # What comes out is never x itself.
    y = y if factor == 1 and n > 1 else y * factor
    return y.to(x.dtype).contiguous()


def encode(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0, factor: float = 1.0, transpose: bool = False) -> RowCodes:
    run = kernel("fake_quantize", device=x.device).run
    made: RowCodes = run.encode(transform(x, factor, transpose), bits, symmetric, clip)
    return made


def _sylvester(y: Tensor) -> Tensor:
    rows, n = y.shape
    half = 1
    while half < n:
        pairs = y.view(rows, n // (2 * half), 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(rows, n)
        half *= 2
    return y
