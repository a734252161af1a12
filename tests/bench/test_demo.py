"""The demo's figures are held against its goals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.demo import Call, goals

PLAN = Call(1.5, 0.2, (), 0)
FIRST = Call(200, 0.3, ("ray",), 17)
SECOND = Call(12, 0.4, (), 17)


def test_all_goals_are_met() -> None:
    assert [g.met for g in goals(PLAN, FIRST, SECOND)] == [True] * 4


@pytest.mark.parametrize(
    ("calls", "missed"),
    [
        ((replace(PLAN, imported=("torch",)), FIRST, SECOND), "bitgrid plan"),
        ((PLAN, replace(FIRST, seconds=250), SECOND), "first run"),
        ((PLAN, FIRST, replace(SECOND, mlflow_runs=18)), "second run"),
        ((PLAN, FIRST, replace(SECOND, imported=("ray",))), "its planning, cache checks"),
    ],
)
def test_a_goal_is_missed(calls: tuple[Call, Call, Call], missed: str) -> None:
    lines = [g.line() for g in goals(*calls)]
    assert [line.endswith(": met") for line in lines].count(False) == 1
    assert any(line.startswith(missed) and line.endswith(": MISSED") for line in lines)
