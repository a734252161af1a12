"""Additions and subtractions of halves, log n times."""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable(device: torch.device) -> str | None:
    return None


def transform(x: Tensor, factor: float = 1.0) -> Tensor:
    rows, n = x.shape
    y = x if x.dtype in (torch.float32, torch.float64) else x.float()
    half = 1
    while half < n:
        pairs = y.view(rows, n // (2 * half), 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(rows, n)
        half *= 2
    return (y if factor == 1 else y * factor).to(x.dtype)
