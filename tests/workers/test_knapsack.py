"""The chosen options are the best of all, by enumeration."""

from __future__ import annotations

import itertools
import random

import pytest

from workers.knapsack import choose


@pytest.mark.parametrize("seed", range(12))
def test_equals_enumeration(seed: int) -> None:
    draw = random.Random(seed)
    items = draw.randint(1, 6)
    sizes = [[draw.choice([64, 96, 128, 200]) * draw.randint(1, 9) for _ in range(draw.randint(1, 4))] for _ in range(items)]
    losses = [[draw.random() * 10.0 ** draw.randint(-6, 0) for _ in s] for s in sizes]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in (least, (least + most) // 2, most):
        allowed = [p for p in itertools.product(*(range(len(s)) for s in sizes)) if _total(sizes, p) <= budget]
        picks = choose(losses, sizes, budget)
        assert tuple(picks) in allowed
        # Losses are scaled by the largest and bounded below 1 each; HiGHS closes the gap to 1e-6 of that.
        assert _total(losses, picks) == pytest.approx(min(_total(losses, p) for p in allowed), abs=1e-6 * max(map(max, losses)))


def test_a_budget_below_the_smallest_options_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest options take 30, the budget is 29"):
        choose([[1.0, 0.0], [1.0, 0.0]], [[10, 20], [20, 40]], 29)


def _total(table: list[list[float]] | list[list[int]], picks: tuple[int, ...] | list[int]) -> float:
    return sum(row[p] for row, p in zip(table, picks, strict=True))
