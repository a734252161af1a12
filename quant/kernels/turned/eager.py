"""By torch's copy."""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable(device: torch.device) -> str | None:
    return None


def turned(source: Tensor, out: Tensor) -> None:
    out.copy_(source.T)
