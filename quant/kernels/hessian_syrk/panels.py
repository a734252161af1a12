"""The lower triangle in panels of rows, by the library's products of 16-bit floats with sums in float32 (`addmm` with an out_dtype)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add", "finished", "unavailable"]

PANEL = 1408
"""Rows of a panel, at most: what lies above the diagonal of a panel is computed for nothing."""


def unavailable(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"torch sums products of 16-bit floats in float32 on CUDA alone, not on {device}"


def add(total: Tensor, x: Tensor, panel: int = PANEL) -> None:
    """float16 and bfloat16 as they are; other types as float32."""
    whole = x.dtype in (torch.float16, torch.bfloat16)
    k = total.shape[0]
    step = -(-k // max(1, round(k / panel)))
    for tokens in x:
        t = tokens if whole else tokens.float()
        for first in range(0, k, step):
            end = min(first + step, k)
            into = total[first:end, :end]
            if whole:
                torch.addmm(into, t[:, first:end].T, t[:, :end], out_dtype=torch.float32, out=into)
            else:
                into.addmm_(t[:, first:end].T, t[:, :end])


def finished(total: Tensor) -> Tensor:
    return total.tril() + total.tril(-1).T
