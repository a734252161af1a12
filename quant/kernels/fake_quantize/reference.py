"""By the grids themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.grids import GRIDS, fit
from quant.kernels.fake_quantize import RowCodes


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    values = x.float().contiguous()
    return _ranges(values, bits, symmetric, clip).round(values).to(x.dtype)


def encode(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> RowCodes:
    values, half = x.float(), 2 ** (bits - 1)
    ranges = _ranges(values, bits, symmetric, clip)
    return RowCodes((ranges.encode(values) - half).to(torch.int8), ranges.scale, ranges.zero - half)


def _ranges(values: Tensor, bits: int, symmetric: bool, clip: float) -> Affine:
    ranged = values if clip == 1 else values * clip
    return fit(GRIDS["absmax" if symmetric else "omni"], ranged, bits, torch.float32)
