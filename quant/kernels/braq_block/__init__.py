"""`braq_block`: one block of columns of BiLLM as its published code rounds it (Huang et al. 2024, arXiv 2402.04291, algorithms 1 and 2).

Columns are ranked by Σ|M|; the first k are salient and binarized twice, a threshold splits the other weights, and both halves are binarized
once, all with means. k and the threshold are those of least error of M, w²/U_jj² or w itself.

Every twin has `solver(weight, upper, wanted, out) ▸ solve(start)`: weight `[N, K]`, upper `[K, K]`, both of one float type. `solve` rounds
the block that begins at column `start`, writes its part of `out`, and gives the errors (w - q) / U_jj `[N, C]`; it reads that block alone
and leaves the weight as it is. Nobody but the next call changes the errors.
Twins differ by rounding: of sums over columns and rows, by which ties of choices may go the other way, and of scales and means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant import kernels

__all__ = ["MOST_SALIENT", "SPLITS", "Binarized", "Solve", "Wanted", "chosen", "counts"]

MOST_SALIENT, SPLITS = 49, 81
"""Salient columns of a block at most; thresholds that are tried."""
Solve = Callable[[int], Tensor]
"""First column of a block ▸ its errors `[N, B]`, which may lie where the next block's will."""


@dataclass(frozen=True)
class Wanted:
    """How every block of a weight is rounded."""

    block_size: int
    """Columns; the last block may be narrower."""
    dtype: torch.dtype
    """Of scales and means as they are stored: float32 or float16."""
    hessian: bool = True
    """M is w²/U_jj²; else w."""
    salient: int | None = None
    """Count of salient columns of every block; None: the best of 1 to MOST_SALIENT."""

    def counts(self, columns: int) -> range:
        """To choose from in a block of so many columns."""
        return counts(self.salient, columns, 1, MOST_SALIENT)


@dataclass(frozen=True)
class Binarized:
    """What a `BinaryTensor` has, B = ceil(K / block_size)."""

    signs: Tensor
    """bool `[N, K]`."""
    second: Tensor
    """bool `[N, K]`, False in columns that are not salient."""
    split: Tensor
    """bool `[N, K]`, False in salient columns."""
    salient: Tensor
    """bool `[K]`."""
    scale: Tensor
    """`[N, B, 4]` in the weight's type, rounded to the stored one."""
    mean: Tensor
    """`[N, B, 3]`, likewise."""
    wrong: Tensor
    """int64 `[1]`: scales and means that their stored type does not hold; asked for once, at the end."""

    @staticmethod
    def like(weight: Tensor, block_size: int) -> Binarized:
        n, k = weight.shape
        signs, second, split = (torch.empty(n, k, dtype=torch.bool, device=weight.device) for _ in range(3))
        scale, mean = (weight.new_empty(n, -(-k // block_size), count) for count in (4, 3))
        wrong = torch.zeros(1, dtype=torch.int64, device=weight.device)
        return Binarized(signs, second, split, signs.new_empty(k), scale, mean, wrong)


def counts(salient: int | None, columns: int, least: int, most: int) -> range:
    """Of salient columns, to choose from in a block of so many columns: `salient` alone; `least` to `most` where it is None."""
    if salient is not None:
        return range(min(salient, columns), min(salient, columns) + 1)
    return range(min(least, most, columns), min(most, columns) + 1)


def chosen(weight: Tensor, wanted: Wanted) -> kernels.Kernel:
    """The twin for weights `[N, K]`: that for GPUs has no float64 and no wide blocks."""
    return kernels.kernel("braq_block", "auto" if weight.dtype is torch.float32 else "torch", weight.device, weight=weight, wanted=wanted)
