"""Bits under a budget: one option per linear, least total loss, total size within the budget. Exact (HiGHS' branch and bound) to 2e-9 of
what the choice loses beyond the best options without a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

PARTS = 1e3
"""The known loss, in the objective of the solver."""


def choose(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Option of each item. losses and sizes: per item, per option; sizes (not negative) and budget in one unit.

    Raises ValueError where even the smallest options exceed the budget, or a loss is not finite."""
    if not all(math.isfinite(x) for item in losses for x in item):
        raise ValueError("losses must be finite")
    least = sum(min(s) for s in sizes)
    if least > budget:
        raise ValueError(f"the smallest options take {least}, the budget is {budget}")
    counts = [len(s) for s in sizes]
    starts = np.cumsum([0, *counts[:-1]])
    # What an option loses beyond its item's best one: the choice is the same.
    excess = np.array([x - min(item) for item in losses for x in item])
    flat_size = np.array([x for item in sizes for x in item], dtype=np.int64)
    # Small whole numbers keep the solver's absolute tolerances far below one unit.
    unit = math.gcd(*flat_size.tolist()) or 1
    rows = np.repeat(np.arange(len(counts)), counts)
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(flat_size[None] / unit, ub=budget // unit)]
    picks = np.array([np.argmin(s) for s in sizes])
    loss = float(excess[starts + picks].sum())
    # The solver stops within 1e-6 of the least objective: so losses are given in parts of what a known choice loses. No better choice
    # has an option that loses more than all of it.
    while loss > 0:
        found = milp(
            np.minimum(excess / loss, 1) * PARTS,
            constraints=limits,
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, (excess <= loss).astype(float)),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise ValueError(f"no choice within the budget of {budget} was found: {found.message}")
        chosen = found.x.round().astype(bool)
        better = np.array([chosen[s : s + n].argmax() for s, n in zip(starts, counts, strict=True)])
        before, now = loss, float(excess[starts + better].sum())
        if now < loss:
            picks, loss = better, now
        if loss > before / 2:
            break
    return [int(p) for p in picks]
