"""`claq_block`: one block of CLAQ's columns (Wang et al. 2024). Each, with all earlier errors fed back, is replaced by the nearest of its
own k-means centres, or of centres that are given; weights at its ends may be kept as they are; its error is fed into the columns after it.

Columns are stored one after another: block, codes, values and errors are `[B, N]`, upper is `[B, B]`. Every twin has
`solve_block(block, upper, wanted, out) -> Found`. The block may be changed (the operator of torch leaves it as it is); `out` is written to.
One that is faster on blocks of several linears that have one factor has `solve_blocks(parts, upper) -> list[Found]` too, where each part
is what it is alone, bit for bit. `solve_blocks` here is for all twins.
Twins for a CPU agree bit for bit. Twins for a GPU sum in another order for k-means, and the one in CUDA C++ divides errors by the diagonal
where torch multiplies by its inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.kernels.gptq_block import SolvedBlock
from quant.kernels.kmeans_columns import bins, draws_on

__all__ = ["REASONS", "TYPES", "Found", "Part", "SolvedBlock", "Wanted", "planned", "refuse", "solve_blocks"]

REASONS = ("a codebook does not fit float16", "reserved weights do not fit float16")
"""What a narrow stored type may not hold."""
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Numbers that compiled twins know stored types by."""


@dataclass(frozen=True)
class Wanted:
    """Of a block of B columns."""

    widths: list[int]
    """Bits of each column's codes."""
    tails: list[tuple[int, int]] | None
    """Weights to keep at the top and at the bottom of each column, ties not counted; None: nothing is kept."""
    dtype: torch.dtype
    """Of tables and kept weights: float32, float16 or bfloat16."""
    start: str
    """Of k-means."""
    centres: Tensor | None = None
    """`[B, 2^b]`, ascending, of the block's type, contiguous; b as in `Found.tables`, and of narrower columns the rest is not read. None: a
    column's own, after the errors of the earlier ones."""


@dataclass(frozen=True)
class Found:
    """What a twin makes of a block besides what it writes."""

    tables: Tensor
    """`[B, 2^b]`, of the wanted type; b is the largest width, and narrower columns have zeros at the end."""
    kept: Tensor | None
    """bool `[B, N]`."""
    wrong: Tensor | None
    """bool `[2]`, which of REASONS hold; given by twins on a GPU, where asking waits for all that was started. Others raise."""


@dataclass(frozen=True)
class Part:
    """A block of one linear."""

    block: Tensor
    wanted: Wanted
    out: SolvedBlock


def solve_blocks(run: Any, parts: Sequence[Part], upper: Tensor) -> list[Found]:
    """By a twin, of blocks with one factor: side by side where it can."""
    if hasattr(run, "solve_blocks"):
        found: list[Found] = run.solve_blocks(parts, upper)
        return found
    return [run.solve_block(part.block, upper, part.wanted, part.out) for part in parts]


def refuse(wrong: Tensor) -> None:
    """Raises ScaleDtypeError where one of the two holds."""
    for reason, holds in zip(REASONS, wrong.tolist(), strict=True):
        if holds:
            raise ScaleDtypeError(reason)


def planned(block: Tensor, wanted: Wanted, out: SolvedBlock) -> Tensor:
    """int64 `[B, 5]`, on the host: what compiled twins are told of each column. Raises ValueError for what is not contiguous or not like
    the block."""
    if not block.is_contiguous():
        raise ValueError(f"the block has shape {tuple(block.shape)} and strides {block.stride()}; it must be contiguous")
    out.check(block)
    if wanted.centres is not None:
        shape, there = (len(block), 2 ** max(wanted.widths)), wanted.centres
        if there.shape != shape or there.dtype != block.dtype or there.device != block.device or not there.is_contiguous():
            given = (tuple(there.shape), there.dtype, there.device, there.stride())
            raise ValueError(f"centres are {given}; they must be contiguous, {shape}, {block.dtype} and on {block.device}")
    fits = wanted.start == "plus_plus" and wanted.centres is None
    draws = {w: draws_on(2**w, block.device).data_ptr() if fits else 0 for w in set(wanted.widths)}
    ends = wanted.tails or [(0, 0)] * len(block)
    return torch.tensor([(2**w, bins(2**w), draws[w], *ends[j]) for j, w in enumerate(wanted.widths)], dtype=torch.int64)
