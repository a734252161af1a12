"""The update in Triton, float32 on tensor cores in one of three forms. A sum takes the columns in one order wherever it lies, so that
a stack of parts has the results of each alone.

tf32: three products of TF32 each. A number is the sum of two of TF32, but for 2^-22 of it; of the four products the one of the two smaller
parts is left out.

By parts: six products of bfloat16 each. A number is the sum of three of bfloat16, hi + mid + lo, each the rest rounded to nearest: |mid| ≤
2^-8 |x|, |lo| ≤ 2^-17 |x|, and 24 bits are exactly three times eight. Of the nine products mid lo, lo mid and lo lo are left out, u = 2^-24
of |left| |right| at most. Small ones are added first: while they are, a sum is at most 2^-7 Σ |left| |right|, so that rounding takes
B (1 + 2^-5) u Σ |left| |right|, which with what was left out is within (B + 8) u for B up to 128, the most that is taken.
A bfloat16's last bit is worth 2^-133 at least: numbers below 2^-110 are taken to within 2^-134, which adds Σ (|left| + |right|) 2^-134 to
the error. From 2^128 - 2^119 on (3.39e38) hi is infinite: there and with numbers that are not finite the results are not finite either.

By halves: three products of float16 each, where a product is over many columns (`halves.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quant.kernels import on_triton
from quant.kernels.lazy_update import halves
from quant.kernels.on_triton import has_gluon, interpreted, multiprocessors, unavailable

__all__ = ["lazy_update", "reach", "refuses", "unavailable"]


@dataclass(frozen=True)
class Tile(on_triton.Tile):
    """By parts all of the block's columns are multiplied at a time; step is their least number."""

    parts: bool = False
    gluon: bool = False
    """By `hopper.py`, by parts; by halves by `hopper_halves.py`."""
    halves: bool = False
    """By `halves.py`; step is the columns that are multiplied at a time."""


TILE = Tile(128, 64, 32, 4, 3)
"""The fastest on an H200."""
ROOMY = Tile(128, 64, 32, 8, 3)
"""Where that one would spill: before 9.0, and where sizes are no multiples of 16."""
HOPPER = Tile(128, 128, 64, 8, 1, parts=True, gluon=True)
BY_PARTS = False
"""Whether blocks go by `hopper.py` where a GPU has what it needs: right there, but a whole configuration of GPTQ took no less time."""
WIDE = Tile(128, 128, 64, 4, 3, gluon=True, halves=True)
"""For products over many columns, where a GPU has what `hopper_halves.py` needs. Two programs share a multiprocessor."""
LEAST_WIDE = 256
"""Columns from which on WIDE is taken."""
REACH = 512
"""Columns of finished blocks that are taken off all later ones at once, where WIDE is taken; 0 where each block's are. More of them read
and write later weights more rarely; but those of the blocks among them, which each of the blocks updates, become more."""
MOST = 128
"""Columns of a block by parts: all operands of a tile are in shared memory at once."""
SHARED = 227 * 1024
"""Bytes of a multiprocessor of compute capability 9.0 that programs may use. NVIDIA, CUDA C++ Programming Guide."""
START = 0.6
"""Of a program's time, in tiles: reading and splitting its first operands, while nothing is multiplied. Estimated from their bytes."""


def refuses(later: Tensor) -> str | None:
    """None, or why it does not update weights like these."""
    return None if later.dtype is torch.float32 else f"the Triton program takes float32, not {later.dtype}"


def tile_for(r: int, n: int, b: int, device: torch.device) -> Tile:
    if interpreted():
        return Tile(32, 32, 16, 4, 1)
    if b >= LEAST_WIDE and b <= halves.MOST and has_wide(device):
        return WIDE
    if BY_PARTS and b <= MOST and _has_hopper(device):
        return HOPPER
    return TILE if r % 16 == n % 16 == 0 and torch.cuda.get_device_capability(device) >= (9, 0) else ROOMY


def reach(block: int, device: torch.device) -> int:
    """Columns, a multiple of those of a block."""
    return max(1, REACH // block) * block if has_wide(device) else block


def lazy_update(later: Tensor, left: Tensor, right: Tensor, stack: Sequence[int] | None = None, tile: Tile | None = None) -> None:
    (r, n), b = later.shape, left.shape[1]
    reason = refuses(later)
    if reason is not None:
        raise ValueError(f"{reason}; kernel(..., later=later) chooses a backend that takes it")
    if not later.numel() or not b:
        return
    if later.stride(1) != 1:
        raise ValueError(f"rows of later must be contiguous; its strides are {later.stride()}")
    tile = tile or tile_for(r, n, b, later.device)
    if tile.parts and b > MOST:
        raise ValueError(f"by parts a block has at most {MOST} columns, not {b}; Tile(parts=False) takes more")
    given = right if right.stride(1) == 1 else right.contiguous()
    strides = (later.stride(0), left.stride(0), left.stride(1), given.stride(0))
    if tile.halves:
        halves.lazy_update(later, left, given, tile)
        return
    tops, asides = -(-r // tile.rows), -(-n // tile.columns)
    if tile.gluon:
        from quant.kernels.lazy_update.hopper import update_by_parts as on_hopper

        padded = padded_to(b, tile)
        at_once = max(1, SHARED // (6 * padded * (tile.rows + tile.columns)))
        each = tiles_each(tops, asides, at_once * multiprocessors(later.device))
        on_hopper[(asides, -(-tops // each))](
            later, left, given, r, n, *strides, each,
            B=b, PADDED=padded, ROWS=tile.rows, COLUMNS=tile.columns, WARPS=tile.warps,
            WHOLE=r % tile.rows == 0 and n % tile.columns == 0, num_warps=tile.warps,
        )  # fmt: skip
        return
    from quant.kernels.lazy_update.program import update, update_by_parts

    if tile.parts:
        import triton.language as tl

        update_by_parts[(tops, asides)](
            later, left, given, r, n, *strides,
            B=b, PADDED=padded_to(b, tile), ROWS=tile.rows, COLUMNS=tile.columns, TYPE=tl.float32 if interpreted() else tl.bfloat16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return
    update[(tops, asides)](
        later, left, given, r, n, *strides,
        B=b, PADDED=-(-b // tile.step) * tile.step, ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, PRECISION="tf32x3",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def padded_to(b: int, tile: Tile) -> int:
    """Columns of a block by parts, with those that are zero: a power of two."""
    return max(tile.step, 1 << max(b - 1, 0).bit_length())


@cache
def tiles_each(tops: int, asides: int, at_once: int) -> int:
    """Tiles of rows that one program of `hopper.py` takes, of `tops`, so that all `asides` columns of tiles are done soonest: each wave of
    `at_once` programs takes START and its tiles."""
    return min(range(1, min(tops, 16) + 1), key=lambda each: -(-(-(-tops // each) * asides) // at_once) * (each + START))


@cache
def has_wide(device: torch.device) -> bool:
    if interpreted() or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return has_gluon("quant.kernels.lazy_update.hopper_halves")


@cache
def _has_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and has_gluon("quant.kernels.lazy_update.hopper")
