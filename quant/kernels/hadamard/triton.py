"""The transform in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.hadamard import reference
from quant.kernels.on_triton import unavailable

__all__ = ["transform", "unavailable"]

MOST = 16384
"""Values a program holds in registers. Longer rows are transformed in parts of as many, and the parts then with each other."""


def transform(x: Tensor, factor: float = 1.0) -> Tensor:
    rows, n = x.shape
    if n > MOST:
        parts = _within(x.reshape(-1, MOST), 1.0).view(rows, -1, MOST).transpose(1, 2)
        across = reference.transform(parts.reshape(rows * MOST, -1), factor)
        return across.view(rows, MOST, -1).transpose(1, 2).reshape(rows, n)
    return _within(x, factor)


def _within(x: Tensor, factor: float) -> Tensor:
    from quant.kernels.hadamard.program import transform as program

    rows, n = x.shape
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    together = max(1, min(2048 // n, 64))
    if rows:
        warps = max(1, min(16, n * together // 512))
        grid = (-(-rows // together),)
        # Triton takes numbers as float32.
        own = 1.0 if x.dtype is torch.float64 else factor
        program[grid](x.contiguous(), out, rows, own, N=n, LOG=n.bit_length() - 1, ROWS=together, num_warps=warps)
    return out.mul_(factor) if x.dtype is torch.float64 else out
