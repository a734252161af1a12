"""Bits under a budget: one option per linear, least total loss, total size within the budget. Exact (HiGHS' branch and bound)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


def choose(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Option of each item. losses and sizes: per item, per option (not negative); sizes and budget in one unit.

    Raises ValueError where even the smallest options exceed the budget."""
    least = sum(min(s) for s in sizes)
    if least > budget:
        raise ValueError(f"the smallest options take {least}, the budget is {budget}")
    counts = [len(s) for s in sizes]
    flat_loss = np.array([x for item in losses for x in item])
    flat_size = np.array([x for item in sizes for x in item], dtype=np.int64)
    # Small whole numbers keep the solver's absolute tolerances far below one unit; the scale of losses does not matter.
    unit = math.gcd(*flat_size.tolist()) or 1
    scale = flat_loss.max() or 1.0
    rows = np.repeat(np.arange(len(counts)), counts)
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    found = milp(
        flat_loss / scale,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_size[None] / unit, ub=budget // unit)],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"no choice within the budget of {budget} was found: {found.message}")
    picks = found.x.round().astype(bool)
    starts = np.cumsum([0, *counts[:-1]])
    return [int(picks[s : s + n].argmax()) for s, n in zip(starts, counts, strict=True)]
