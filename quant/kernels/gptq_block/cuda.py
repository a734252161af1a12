"""The block in CUDA C++ (`quant/csrc/gptq_block.cu`): float32, at most 128 columns.

Columns are taken in panels of 16. Errors of its own panel and of the eight columns before come off a weight by operations rounded once, all
earlier ones by sums of tensor cores, of numbers split in two: each column is what the errors before it leave of it within some roundings
of float32, fewer than the plain loop's (docs/adr/0032-errors-by-tensor-cores.md). At least 99.9 % of codes are the reference's. A row has
the same bits whatever stands beside it.

It refuses float64 blocks and wider ones. A call copies nothing from the host and waits for nothing, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from array import array
from functools import lru_cache, partial

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels import on_cuda
from quant.kernels.gptq_block import KINDS, Fits, SolvedBlock

ADDS_LOSS = True
"""`out.loss` is added to here."""
SKIPS_VALUES = True
"""`out.values` may have no elements: nobody wants them, and nearly a third of what a launch writes and reads is not written."""
COLUMNS, PANEL, MOST = 128, 16, 2**30
"""Of a block; that the kernel takes together; weights in a block, whose bytes are counted in 32 bits."""

unavailable = partial(on_cuda.unavailable, "gptq_block")


def refuses(block: Tensor) -> str | None:
    """None, or why it does not solve blocks like this one."""
    if block.dtype is not torch.float32:
        return f"the CUDA library takes float32, not {block.dtype}"
    if block.shape[0] > COLUMNS or block.numel() >= MOST:
        return f"the CUDA library takes blocks of at most {COLUMNS} columns and {MOST - 1} weights, not {' x '.join(map(str, block.shape))}"
    return None


def solve_block(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None = None, fits: Fits | None = None, lanes: int = 0
) -> SolvedBlock:
    """lanes: of a warp that share a row, 1 or 4; -2: each has two rows, of which there are a multiple of 64, with whole zeros and panels of
    one group each; 0 chooses by the number of rows. Raises RuntimeError for others."""
    reason = refuses(block)
    if reason is not None:
        raise ValueError(f"{reason}; kernel(..., block=block) chooses a backend that takes it")
    out = SolvedBlock.like(block) if out is None else out
    if block.numel():
        values, kept = arguments(block, upper, affine, group, out, fits)
        on_cuda.call("gptq_block", "bitgrid_gptq_block", *values, lanes)
        del kept
    return out


def arguments(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock, fits: Fits | None = None
) -> tuple[list[Tensor | int], array[int]]:
    """Of the C++ entry, but lanes; and the memory of `group`, to be kept until the call returns."""
    if fits is not None:
        fits.check(block, affine)
    w = block.contiguous()
    out.check(w, needs_values=False)
    if out.loss is not None and not (out.loss.is_contiguous() and out.loss.dtype == w.dtype and out.loss.shape == w.shape[1:]):
        raise ValueError(f"out.loss is {tuple(out.loss.shape)}, {out.loss.dtype}; it must be contiguous, one float32 for each row")
    rows, least, most, in_panels = _rows(tuple(group))
    if len(rows) != w.shape[0] or least < 0 or most >= affine.scale.shape[0]:
        raise ValueError(f"group has {len(rows)} numbers in {least} .. {most} for {w.shape[0]} columns and {len(affine.scale)} groups")
    # A view's rows may lie apart; only their floats must lie together.
    u, scale, zero = (t if t.stride(-1) == 1 and t.dtype == w.dtype else t.to(w).contiguous() for t in (upper, affine.scale, affine.zero))
    tops = 0 if affine.tops is None else affine.tops.to(w).contiguous()
    kind = KINDS.get(affine.kind, 0)
    numbers = (u.stride(0), scale.stride(0), zero.stride(0), *w.shape, affine.top, kind, int(kind == 0 and in_panels))
    found = (0, 0) if fits is None else (fits.words, fits.odd)
    made = (out.codes, out.values if out.values.numel() else 0, out.errors, 0 if out.loss is None else out.loss)
    return [w, u, scale, zero, rows.buffer_info()[0], *numbers, *made, tops, *found], rows


@lru_cache(maxsize=1024)  # blocks of a model's layers, which come again
def _rows(group: tuple[int, ...]) -> tuple[array[int], int, int, bool]:
    """The groups of a block's columns as C++ reads them, the least and the most of them, and whether every panel has one."""
    rows = array("i", group)
    panels = len(rows) % PANEL == 0 and all(len(set(rows[at : at + PANEL])) == 1 for at in range(0, len(rows), PANEL))
    return rows, min(rows), max(rows), panels
