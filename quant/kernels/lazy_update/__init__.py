"""`lazy_update`: what the errors of solved blocks take off all later weights, of GPTQ's lazy batches (arXiv 2210.17323, section 4).

Every twin has `lazy_update(later, left, right, stack=None)`: `later -= left @ right`, in place, later `[R, N]`, left `[R, B]`, right
`[B, N]`, of one type, with any strides; B are the columns of one block, or of many. stack: sizes of parts of N whose results are to be
those that each has alone, bit for bit; None where there is one. Sums are float32's (float64's): their error is at most (B + 8) u
Σ |left| |right|, u = 2^-24 (2^-53); more than 1,024 columns may be taken off by so many, one after another.

`reach(block, device)` says how many columns, of blocks of so many, are best taken off all columns beyond them at once;
`span(block, device)` of how many columns spans are best that pull (`solver.solve_affine`), None where pushing is better.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.kernels import on_triton


@dataclass(frozen=True)
class Tile(on_triton.Tile):
    """Of `later`; step is the columns that are multiplied at a time."""

    halves: bool = False
    """By `halves.py`."""
    gluon: bool = False
    """By `hopper_halves.py`, by halves."""
