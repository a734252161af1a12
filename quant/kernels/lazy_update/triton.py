"""The update in Triton: float32 by three products of TF32 each, on tensor cores.

A number is the sum of two of TF32, but for 2^-22 of it; of the four products the one of the two smaller parts is left out. A sum takes the
block's columns in one order wherever it lies, so that a stack of parts has the results of each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.on_triton import interpreted, unavailable

__all__ = ["lazy_update", "refuses", "unavailable"]


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    step: int
    """Of the block's columns that are multiplied at a time."""
    warps: int
    stages: int


TILE = Tile(128, 64, 32, 4, 3)


def refuses(later: Tensor) -> str | None:
    """None, or why it does not update weights like these."""
    return None if later.dtype is torch.float32 else f"the Triton program takes float32, not {later.dtype}"


def lazy_update(later: Tensor, left: Tensor, right: Tensor, stack: Sequence[int] | None = None, tile: Tile | None = None) -> None:
    from quant.kernels.lazy_update.program import update

    (r, n), b = later.shape, left.shape[1]
    reason = refuses(later)
    if reason is not None:
        raise ValueError(f"{reason}; kernel(..., later=later) chooses a backend that takes it")
    if not later.numel():
        return
    if later.stride(1) != 1:
        raise ValueError(f"rows of later must be contiguous; its strides are {later.stride()}")
    given = right if right.stride(1) == 1 else right.contiguous()
    tile = tile or (Tile(32, 32, 16, 4, 1) if interpreted() else TILE)
    grid = (-(-r // tile.rows), -(-n // tile.columns))
    update[grid](
        later, left, given, r, n, later.stride(0), left.stride(0), left.stride(1), given.stride(0),
        B=b, PADDED=-(-b // tile.step) * tile.step, ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, PRECISION="tf32x3",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
