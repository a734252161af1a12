"""`gptq_block`: one block of the GPTQ column solver with affine codes (Frantar et al. 2022, algorithm 1, the inner loop).

Columns are stored one after another: block, codes, values and errors are `[B, N]`, upper is `[B, B]`; scale and zero are `[G, N]` and
`group[j]` is the row of column j. Every twin has `solve_block(block, upper, affine, group, out=None) -> SolvedBlock`; the block is
not changed, and scale, zero and upper may be views. `out` is written to and returned: fresh memory for each block costs a CPU more than
the block itself. `kernel` is to be told of the block: `block=...`, any of its shape and type.

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

KINDS = {ZeroKind.FLOAT: 1, ZeroKind.MINIMUM: 2}
"""Numbers that compiled twins know kinds of zero by. All others are 0: a whole zero, added after rounding."""


def stacked(parts: Sequence[tuple[Affine, list[int]]]) -> tuple[Affine, list[int]]:
    """Scale and zero `[G, N_i]` of several parts of the rows, and of each column its row in them ▸ those of all rows `[G', N]` together.
    Columns that share a group in every part share one here."""
    columns = list(zip(*(group for _, group in parts), strict=True))
    rows = {own: row for row, own in enumerate(dict.fromkeys(columns))}

    def joined(name: str) -> Tensor:
        given = [getattr(affine, name) for affine, _ in parts]
        picked = [[own[i] for own in rows] for i in range(len(parts))]
        # As they are, where groups are the same in all: no copy of each row.
        whole = all(p == list(range(len(t))) for t, p in zip(given, picked, strict=True))
        return torch.cat(given if whole else [torch.stack([t[g] for g in p]) for t, p in zip(given, picked, strict=True)], dim=1)

    first, bits = parts[0][0], [affine.bits for affine, _ in parts]
    tops = None
    if len(set(bits)) > 1:
        tops = torch.cat([affine.scale.new_full(affine.scale.shape[1:], affine.top) for affine, _ in parts])
    return Affine(joined("scale"), joined("zero"), max(bits), first.kind, tops), [rows[own] for own in columns]


@dataclass(frozen=True)
class SolvedBlock:
    """Each `[B, N]`, in the float type of the block."""

    codes: Tensor
    values: Tensor
    errors: Tensor
    """(w_j - q_j) / U_jj of the column as updated."""
    loss: Tensor | None = None
    """`[N]`, given by a caller: twins with ADDS_LOSS add each row's sum of squared errors to it; others leave it."""

    @classmethod
    def like(cls, block: Tensor) -> SolvedBlock:
        """Not filled."""
        return cls(torch.empty_like(block), torch.empty_like(block), torch.empty_like(block))
