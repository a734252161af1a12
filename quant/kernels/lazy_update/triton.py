"""The update in Triton, float32 on tensor cores in one of two forms. A sum takes the columns in one order wherever it lies, so that
a stack of parts has the results of each alone.

tf32: three products of TF32 each. A number is the sum of two of TF32, but for 2^-22 of it; of the four products the one of the two smaller
parts is left out.

By halves: three products of float16 each, where a product is over many columns (`halves.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from quant.kernels.lazy_update import Tile, halves
from quant.kernels.on_triton import has_gluon, interpreted, unavailable

__all__ = ["lazy_update", "reach", "refuses", "span", "unavailable"]


TILE = Tile(128, 64, 32, 4, 3)
"""The fastest on an H200."""
ROOMY = Tile(128, 64, 32, 8, 3)
"""Where that one would spill: before 9.0, and where sizes are no multiples of 16."""
WIDE = Tile(128, 128, 64, 4, 3, gluon=True, halves=True)
"""For products over many columns, where a GPU has what `hopper_halves.py` needs. Two programs share a multiprocessor."""
LEAST_WIDE = 256
"""Columns from which on WIDE is taken."""
REACH = 512
"""Columns of finished blocks whose errors are taken off all columns beyond at once, where WIDE is taken; 0: those of each block. With more
columns later weights are read and written more rarely, but those within a reach, which each of its blocks updates, are more."""


def refuses(later: Tensor) -> str | None:
    """None, or why it does not update weights like these."""
    return None if later.dtype is torch.float32 else f"the Triton program takes float32, not {later.dtype}"


def tile_for(r: int, n: int, b: int, device: torch.device) -> Tile:
    """For `later` `[r, n]` and a product over b columns."""
    if interpreted():
        return Tile(32, 32, 16, 4, 1)
    if b >= LEAST_WIDE and has_wide(device):
        return WIDE
    return TILE if r % 16 == n % 16 == 0 and torch.cuda.get_device_capability(device) >= (9, 0) else ROOMY


def reach(block: int, device: torch.device) -> int:
    """Columns, a multiple of those of a block."""
    return max(1, REACH // block) * block if has_wide(device) else block


def span(block: int, device: torch.device) -> int | None:
    """None: what pulling takes on a GPU is not measured yet (`bench.gpu forms`)."""
    return None


def lazy_update(later: Tensor, left: Tensor, right: Tensor, stack: Sequence[int] | None = None, tile: Tile | None = None) -> None:
    (r, n), b = later.shape, left.shape[1]
    reason = refuses(later)
    if reason is not None:
        raise ValueError(f"{reason}; kernel(..., later=later) chooses a backend that takes it")
    if not later.numel() or not b:
        return
    if later.stride(1) != 1:
        raise ValueError(f"rows of later must be contiguous; its strides are {later.stride()}")
    if tile is None and b > halves.MOST:
        for first in range(0, b, halves.MOST):
            part = slice(first, first + halves.MOST)
            lazy_update(later, left[:, part], right[part])
        return
    tile = tile or tile_for(r, n, b, later.device)
    given = right if right.stride(1) == 1 else right.contiguous()
    if tile.halves:
        halves.lazy_update(later, left, given, tile)
        return
    from quant.kernels.lazy_update.program import update

    update[(-(-r // tile.rows), -(-n // tile.columns))](
        later, left, given, r, n, later.stride(0), left.stride(0), left.stride(1), given.stride(0),
        B=b, PADDED=-(-b // tile.step) * tile.step, ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, PRECISION="tf32x3",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@cache
def has_wide(device: torch.device) -> bool:
    """Whether WIDE works there."""
    if interpreted() or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return has_gluon("quant.kernels.lazy_update.hopper_halves")
