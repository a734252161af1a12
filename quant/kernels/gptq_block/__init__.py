"""`gptq_block`: one block of the GPTQ column solver with affine codes (Frantar et al. 2022, algorithm 1, the inner loop).

Columns are stored one after another: block, codes, values and errors are `[B, N]`, upper is `[B, B]`; scale and zero are `[G, N]` and
`group[j]` is the row of column j. Every twin has `solve_block(block, upper, affine, group, out=None) -> SolvedBlock`; the block is
not changed, and scale, zero and upper may be views. `out` is written to and returned: fresh memory for each block costs a CPU more than
the block itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.affine import ZeroKind

KINDS = {ZeroKind.FLOAT: 1, ZeroKind.MINIMUM: 2}
"""Numbers that compiled twins know kinds of zero by. All others are 0: a whole zero, added after rounding."""


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
