"""By the grids themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.grids import GRIDS, fit


def unavailable(device: torch.device) -> str | None:
    return None


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    values = x.float()
    ranged = values if clip == 1 else values * clip
    return fit(GRIDS["absmax" if symmetric else "omni"], ranged, bits, torch.float32).round(values).to(x.dtype)
