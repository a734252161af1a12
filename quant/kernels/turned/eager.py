"""By torch's copy."""

from __future__ import annotations

from torch import Tensor


def turned(source: Tensor, out: Tensor) -> None:
    out.copy_(source.T)
