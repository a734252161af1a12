"""The lower triangle in Triton: half the products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quant.kernels.on_triton import interpreted, unavailable

__all__ = ["add", "finished", "unavailable"]

PROMOTE = 8192
"""Tokens of a partial sum: each is added to the total in memory, and fewer tokens would make that take longer than the products. The error
is less than that of cuBLAS with 16,384."""
CHUNK = PROMOTE
"""Tokens that are added together where there are as many."""


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    step: int
    """Tokens that are multiplied at a time."""
    warps: int
    stages: int
    described: bool = False
    """Loaded by the GPU's copy engine (9.0), which needs rows of x at addresses that are multiples of 16 bytes."""


LARGE = 6144


def tile_for(dtype: torch.dtype, k: int, capability: int) -> Tile:
    """With which no sum is spilled."""
    if dtype is torch.float32:
        return Tile(64, 64, 16, 8, 2)
    if capability < 9:
        return Tile(64, 64, 64, 4, 3)
    # Of few channels large tiles would leave multiprocessors without one.
    return Tile(256, 128, 64, 8, 4, True) if k > LARGE else Tile(128, 128, 64, 4, 3, True)


def add(total: Tensor, x: Tensor, tile: Tile | None = None) -> None:
    """float16 and bfloat16 as they are, with float32 sums; other types as float32, without tensor cores."""
    from quant.kernels.hessian_syrk.program import add_lower

    # The interpreter has no products of bfloat16.
    whole = x.dtype in (torch.float16, torch.bfloat16) and not (interpreted() and x.dtype is torch.bfloat16)
    given = (x if whole else x.float()).to(total.device).contiguous()
    sequences, length, k = given.shape
    if tile is None:
        tile = Tile(32, 32, 16, 4, 1) if interpreted() else tile_for(given.dtype, k, torch.cuda.get_device_capability(given.device)[0])
    described = tile.described and k * given.element_size() % 16 == 0 and given.data_ptr() % 16 == 0
    blocks = (_described(given, tile.step, tile.rows), _described(given, tile.step, tile.columns)) if described else (given, given)
    # No longer than the sequences, rounded up so that few versions are compiled: the sums are the same.
    promoted = min(PROMOTE, max(tile.step, 1 << max(length - 1, 0).bit_length()))
    programs = _lower_tiles(k, tile.rows, tile.columns, total.device)
    add_lower[(programs.shape[0],)](
        total, given, *blocks, programs, sequences, length, k,
        ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, PROMOTE=promoted // tile.step, PRECISION="ieee", DESCRIBED=described,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _described(x: Tensor, step: int, channels: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [1, step, channels])


@cache
def _lower_tiles(k: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """int32 `[P, 2]`: row and column of each tile that holds some of the lower triangle."""
    found = [(i, j) for i in range(-(-k // rows)) for j in range(-(-min(k, (i + 1) * rows) // columns))]
    return torch.tensor(found, dtype=torch.int32, device=device)


def finished(total: Tensor) -> Tensor:
    return total.tril() + total.tril(-1).T
