"""`fake_quantize`: every row of x `[R, n]` rounded to a grid of its own, in one pass over memory.

By the grids `absmax` (symmetric) and `omni` of `quant.grids`, in float32 arithmetic, without gradient; the range of a row is that of its
values times `clip`. Every twin has, with the same results bit for bit,
- `fake_quantize(x, bits, symmetric, clip) ▸ [R, n]` in the type of x; a row with a NaN becomes NaN
- `encode(x, bits, symmetric, clip) ▸ RowCodes`: what the values are made of
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowCodes:
    """x ≈ (codes − zero) · scale."""

    codes: Tensor
    """int8 `[R, n]`: the grid's codes less 2^(bits-1)."""
    scale: Tensor
    """float32 `[R, 1]`."""
    zero: Tensor
    """float32 `[R, 1]`: whole numbers, less 2^(bits-1) as well; all 0 with symmetric grids."""
    sums: Tensor | None = None
    """int32 `[R]`: of a row's codes, from twins that have them in passing."""
