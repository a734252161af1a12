"""The lower triangle in Triton: half the products. `hopper.py` makes it where a GPU has the instructions and channels are whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quant.kernels import on_triton
from quant.kernels.hessian_syrk.panels import finished
from quant.kernels.on_triton import has_gluon, interpreted, unavailable

__all__ = ["add", "finished", "refuses", "unavailable"]

PROMOTE = 8192
"""Tokens of a partial sum: each is added to the total in memory, and fewer tokens would make that take longer than the products. The error
is less than that of cuBLAS with 16,384."""
CHUNK = PROMOTE
"""Tokens that are added together where there are as many."""


@dataclass(frozen=True)
class Tile(on_triton.Tile):
    """Of channels; a step is tokens."""

    described: bool = False
    """Loaded by the GPU's copy engine (9.0), which needs rows of x at addresses that are multiples of 16 bytes."""
    gluon: bool = False
    """By `hopper.py`: columns are two blocks of as many channels as there are rows."""


HOPPER = Tile(128, 256, 64, 8, 4, True, gluon=True)
ACROSS = 12
"""Rows of blocks that `hopper.py` goes through together: as many as make the channels that are at work at a time few."""
LARGE = 6144
MOST = 46_340
"""Channels: programs have offsets of 32 bits, which the total's K² numbers must not exceed."""


def refuses(channels: int) -> str | None:
    """None, or why it does not add to a total of so many channels."""
    return None if channels <= MOST else f"{channels} channels; the Triton programs take up to {MOST}"


def tile_for(dtype: torch.dtype, k: int, capability: int, gluon: bool = False) -> Tile:
    """With which no sum is spilled."""
    if gluon and capability == 9 and dtype is not torch.float32 and k > 0 and k % HOPPER.rows == 0:
        return HOPPER
    if dtype is torch.float32:
        return Tile(64, 64, 16, 8, 2)
    if capability < 9:
        return Tile(64, 64, 64, 4, 3)
    # Of few channels large tiles would leave multiprocessors without one.
    return Tile(256, 128, 64, 8, 4, True) if k > LARGE else Tile(128, 128, 64, 4, 3, True)


def add(total: Tensor, x: Tensor, tile: Tile | None = None) -> None:
    """float16 and bfloat16 as they are, with float32 sums; other types as float32, without tensor cores. Raises ValueError."""
    reason = refuses(len(total))
    if reason is not None:
        raise ValueError(f"{reason}; kernel(..., channels={len(total)}) chooses a backend that takes them")
    from quant.kernels.hessian_syrk.program import add_lower

    # The interpreter has no products of bfloat16.
    whole = x.dtype in (torch.float16, torch.bfloat16) and not (interpreted() and x.dtype is torch.bfloat16)
    given = (x if whole else x.float()).to(total.device).contiguous()
    sequences, length, k = given.shape
    aligned = k * given.element_size() % 16 == 0 and given.data_ptr() % 16 == 0
    if tile is None:
        gluon = aligned and not interpreted() and gluon_works()
        capability = 0 if interpreted() else torch.cuda.get_device_capability(given.device)[0]
        tile = Tile(32, 32, 16, 4, 1) if interpreted() else tile_for(given.dtype, k, capability, gluon)
    if tile.gluon:
        _add_with_gluon(total, given, tile)
        return
    described = tile.described and aligned
    blocks = (_described(given, tile.step, tile.rows), _described(given, tile.step, tile.columns)) if described else (given, given)
    # No longer than the sequences, rounded up so that few versions are compiled: the sums are the same.
    promoted = min(PROMOTE, max(tile.step, 1 << max(length - 1, 0).bit_length()))
    programs = _lower_tiles(k, tile.rows, tile.columns, total.device)
    add_lower[(programs.shape[0],)](
        total, given, *blocks, programs, sequences, length, k,
        ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, PROMOTE=promoted // tile.step, PRECISION="ieee", DESCRIBED=described,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _add_with_gluon(total: Tensor, x: Tensor, tile: Tile) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quant.kernels.hessian_syrk.hopper import add_lower

    if not x.numel():
        return
    length, k = x.shape[1:]
    programs = _pairs(k // tile.rows, total.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # A step ends with its sequence, so that only whole steps follow one another across sequences.
    for tokens in (x.flatten(0, 1),) if length % tile.step == 0 else x:
        add_lower[(programs.shape[0],)](
            total, TensorDescriptor.from_tensor(tokens, [tile.step, tile.rows], layout), programs, len(tokens) // length,
            -(-length // tile.step), k,
            BLOCK=tile.rows, STEP=tile.step, PROMOTE=PROMOTE // tile.step, STAGES=tile.stages, WARPS=tile.warps, num_warps=tile.warps,
        )  # fmt: skip


def gluon_works() -> bool:
    return has_gluon("quant.kernels.hessian_syrk.hopper")


def pairs(blocks: int) -> list[tuple[int, int, int, int, int]]:
    """Programs of `hopper.py`: left block, two right ones, 1 where the second counts, 1 where products belong to their transposed place."""
    rows = [(i, j) for i in range(blocks) for j in range(1 if i % 2 == 0 else 0, i, 2)]
    rows.sort(key=lambda at: (at[0] // ACROSS, at[1] // 2, at[0]))
    alone = list(range(0, blocks, 2))
    turned = [(0, i, j, int(i != j), 1) for i, j in zip(alone[::2], alone[1::2] + alone[-1:] * (len(alone) % 2), strict=True)]
    return [(i, j, j + 1, 1, 0) for i, j in rows] + turned


@cache
def _pairs(blocks: int, device: torch.device) -> Tensor:
    return torch.tensor(pairs(blocks), dtype=torch.int32, device=device)


def _described(x: Tensor, step: int, channels: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [1, step, channels])


@cache
def _lower_tiles(k: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """int32 `[P, 2]`: row and column of each tile that holds some of the lower triangle."""
    found = [(i, j) for i in range(-(-k // rows)) for j in range(-(-min(k, (i + 1) * rows) // columns))]
    return torch.tensor(found, dtype=torch.int32, device=device)
