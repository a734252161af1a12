"""`gptq_block`: one block of the GPTQ column solver with affine codes (Frantar et al. 2022, algorithm 1, the inner loop).

Columns are stored one after another: block, codes, values and errors are `[B, N]`, upper is `[B, B]`; scale and zero are `[G, N]` and
`group[j]` is the row of column j. Every twin has `solve_block(block, upper, affine, group, out=None, fits=None) -> SolvedBlock`; the block
is not changed, and scale, zero and upper may be views. `out` is written to and returned: fresh memory for each block costs a CPU more than
the block itself. `kernel` is to be told of the block: `block=...`, any of its shape and type.

With `fits`, ranges of groups that lie whole in the block are found by the same launch, and written to scale and zero. They are those of the
block as it is given, which holds the updates of finished blocks: not those of its own columns before the group, as GPTQ's code has it.

Rows need no others: linears and configurations with one factor and one order are solved together, one after another along rows, with the
results that they have apart, bit for bit. Bits may differ from row to row (`Affine.tops`), groups in width (`stacked`); the kind of zero
may differ where KINDS gives both the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.grids import GRIDS, fit_unchecked, unfit_float16

KINDS = {ZeroKind.FLOAT: 1, ZeroKind.MINIMUM: 2}
"""Numbers that compiled twins know kinds of zero by. All others are 0: a whole zero, added after rounding."""


def stacked(parts: Sequence[tuple[Affine, list[int]]]) -> tuple[Affine, list[int]]:
    """Scale and zero `[G, N_i]` of several parts of the rows, and of each column its row in them ▸ those of all rows `[G', N]` together.
    Columns that share a group in every part share one here."""
    (first, plan), bits = parts[0], [affine.bits for affine, _ in parts]
    if len(parts) == 1:
        return first, plan
    columns = list(zip(*(group for _, group in parts), strict=True))
    rows = {own: row for row, own in enumerate(dict.fromkeys(columns))}

    def joined(name: str) -> Tensor:
        given = [getattr(affine, name) for affine, _ in parts]
        picked = [[own[i] for own in rows] for i in range(len(parts))]
        # As they are, where groups are the same in all: no copy of each row.
        whole = all(p == list(range(len(t))) for t, p in zip(given, picked, strict=True))
        return torch.cat(given if whole else [torch.stack([t[g] for g in p]) for t, p in zip(given, picked, strict=True)], dim=1)

    tops = None
    if len(set(bits)) > 1:
        tops = torch.cat([affine.scale.new_full(affine.scale.shape[1:], affine.top) for affine, _ in parts])
    return Affine(joined("scale"), joined("zero"), max(bits), first.kind, tops), [rows[own] for own in columns]


GRID_NUMBERS = ("g_asym", "g_sym", "awq_asym", "omni", "q_sym", "hqq", "kivi", "absmax")
"""A grid's place is its number in `quant/csrc/ranges.h`."""


@dataclass(frozen=True)
class Fit:
    """How the ranges of some rows are found."""

    rows: int
    width: int
    """Columns of a group, which divides those of the block; 0: scale and zero are given, and what follows says nothing."""
    grid: str = GRID_NUMBERS[0]
    bits: int = 8
    half: bool = False
    """Rounded to float16."""

    @property
    def word(self) -> int:
        """All but `rows`, as compiled twins read it."""
        return self.width << 8 | GRID_NUMBERS.index(self.grid) << 4 | self.half << 3 | self.bits - 1 if self.width else 0


@dataclass(frozen=True)
class Fits:
    """Of all rows. Where compiled twins take them, blocks are float32."""

    parts: tuple[Fit, ...]
    words: Tensor
    """int32 `[N]`."""
    odd: Tensor
    """int32 `[1]`, added to: groups (of one row) that hold NaN or infinity, whose scale or zero float16 does not hold closely enough, or
    whose zero may be 0 of either sign. More than 0: what was found and solved is not to be used; ranges are then `quant.grids`' to find."""

    @classmethod
    def of(cls, parts: Sequence[Fit], device: torch.device) -> Fits:
        """Of rows that lie one after another."""
        # Made where they are used: nothing is copied there.
        words = torch.cat([torch.full((p.rows,), p.word, dtype=torch.int32, device=device) for p in parts])
        return cls(tuple(parts), words, torch.zeros(1, dtype=torch.int32, device=device))

    def check(self, block: Tensor, affine: Affine) -> None:
        """Raises ValueError where a launch cannot find them."""
        self.check_shape(block)
        if block.dtype is not torch.float32:
            raise ValueError(f"ranges are found in float32 blocks, not in {block.dtype}; give scale and zero")
        made = (affine.scale, affine.zero)
        if not all(t.is_contiguous() and t.dtype == block.dtype and t.device == block.device for t in made):
            raise ValueError("scale and zero are written to: they must be contiguous, of the block's type and on its device")

    def check_shape(self, block: Tensor) -> None:
        """Raises ValueError where groups do not lie whole in a block `[B, N]`, or rows are others."""
        widths = sorted({p.width for p in self.parts} - {0})
        if any(width < 0 or len(block) % width for width in widths) or len(self.words) != block.shape[1]:
            said = f"groups of {', '.join(map(str, widths))} columns in {len(self.words)} rows"
            raise ValueError(f"{said} do not fit a block of shape {tuple(block.shape)}; groups lie whole in it")


def find_ranges(block: Tensor, affine: Affine, group: list[int], fits: Fits) -> None:
    """What a launch does with `fits` before it solves, in torch and any float type."""
    fits.check_shape(block)
    end = 0
    for part in fits.parts:
        rows = slice(end, end := end + part.rows)
        for first in range(0, len(block), part.width) if part.width else ():
            w = block[first : first + part.width, rows].T.contiguous()
            made = fit_unchecked(GRIDS[part.grid], w, part.bits, torch.float16 if part.half else torch.float32)
            odd = ~torch.isfinite(w).all(1, keepdim=True)
            if part.half:
                odd |= unfit_float16(made, w)
            if made.kind in KINDS:
                odd |= w.amin(1, keepdim=True) == 0
            fits.odd.add_(odd.sum())
            for g in dict.fromkeys(group[first : first + part.width]):
                affine.scale[g, rows], affine.zero[g, rows] = made.scale[:, 0], made.zero[:, 0]


@dataclass(frozen=True)
class SolvedBlock:
    """Each `[B, N]`."""

    codes: Tensor
    """uint8."""
    values: Tensor
    """In the float type of the block, as errors are; given with no elements where nobody wants them, to twins with SKIPS_VALUES."""
    errors: Tensor
    """(w_j - q_j) / U_jj of the column as updated."""
    loss: Tensor | None = None
    """`[N]`, given by a caller: twins with ADDS_LOSS add each row's sum of squared errors to it; others leave it."""

    @classmethod
    def like(cls, block: Tensor) -> SolvedBlock:
        """Not filled."""
        return cls(torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block), torch.empty_like(block))

    def check(self, block: Tensor, needs_values: bool = True) -> None:
        """Raises ValueError where compiled twins cannot write what they make of the block. Twins with SKIPS_VALUES need no values."""
        made = (self.codes, self.values, self.errors) if needs_values or self.values.numel() else (self.codes, self.errors)
        right = all(t.dtype == (torch.uint8 if t is self.codes else block.dtype) for t in made)
        if not right or not all(t.is_contiguous() and t.shape == block.shape and t.device == block.device for t in made):
            got = [(tuple(t.shape), t.dtype) for t in made]
            wanted = f"{tuple(block.shape)}, codes in uint8, all else in {block.dtype}"
            raise ValueError(f"out holds {got}; it must be contiguous and on the block's device: {wanted}")
