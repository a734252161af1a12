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
        # HiGHS closes the gap to 1e-6 of a thousandth of at most twice the least loss; sums of six floats are off by less.
        assert _total(losses, picks) == pytest.approx(min(_total(losses, p) for p in allowed), rel=1e-8)


def test_an_option_that_ruins_the_model_does_not_blur_the_others() -> None:
    """Losses of a width that destroys a linear are a million times those of the widths that are worth choosing."""
    losses = [[50.0, 4e-6, 1e-6], [30.0, 9e-6, 2e-6], [20.0, 5e-6, 3e-6]]
    sizes = [[20, 40, 60]] * 3
    assert choose(losses, sizes, 140) == [1, 2, 1]  # 11e-6; 1, 1, 2: 16e-6; 2, 1, 1: 15e-6
    assert choose(losses, sizes, 160) == [2, 2, 1]
    assert choose([[x * 1e-6 for x in item] for item in losses], sizes, 140) == [1, 2, 1]


def test_equal_losses_and_free_budgets_need_no_search() -> None:
    assert choose([[0.0, 0.0], [1.0, 1.0]], [[10, 20], [20, 10]], 20) == [0, 1]
    assert choose([[3.0, 1.0], [-1e-12, -2e-12]], [[10, 20], [20, 40]], 60) == [1, 1]


def test_a_budget_below_the_smallest_options_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest options take 30, the budget is 29"):
        choose([[1.0, 0.0], [1.0, 0.0]], [[10, 20], [20, 40]], 29)


def test_losses_that_are_not_finite_are_refused() -> None:
    for odd in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="losses must be finite"):
            choose([[odd, 0.0], [1.0, 0.0]], [[10, 20], [20, 40]], 60)


def _total(table: list[list[float]] | list[list[int]], picks: tuple[int, ...] | list[int]) -> float:
    return sum(row[p] for row, p in zip(table, picks, strict=True))
