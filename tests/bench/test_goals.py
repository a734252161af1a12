"""What the benchmark says of a figure and its goal."""

from __future__ import annotations

import math

import pytest
import torch

from bench.on_gpu.clock import Bench, Ceilings, Goal, Row, going_on, spread, worst

HERE = Ceilings(read_gbs=4000, copy_gbs=3000, launch_us=2, tflops={"bfloat16": 500})


def row(us: float | None = 100.0, goal: Goal | None = None, **more: object) -> Row:
    return Row("a product", 0, 0, us, {"fast": 80.0, "slow": 400.0}, 200_000_000, goal, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("goal", "missed"),
    [
        (Goal(125.0), -0.2),
        (Goal(80.0), 0.25),
        (Goal(0.4, "read"), -0.25),  # 2000 of 4000 GB/s
        (Goal(0.625, "read"), 0.2),
        (Goal(0.8, "copy"), 1 - 2 / 3 / 0.8),
        (Goal(1.0, "speed", ("slow", "fast")), 0.2),  # of the fastest
        (Goal(2.0, "speed", ("slow",)), -1.0),
        (Goal(2.0, "time", ("fast",)), -0.375),
        (Goal(0.2, "time", ("slow",)), 0.25),
    ],
)
def test_by_how_much_a_goal_is_missed(goal: Goal, missed: float) -> None:
    made = row(goal=goal)
    assert goal.missed_by(made, HERE) == pytest.approx(missed)
    line = made.line(HERE)
    assert ("missed by" in line) == (missed > 0)
    assert (f"missed by {100 * missed:.0f} %" if missed > 0 else ": met") in line
    assert made.told(HERE)["missed_by"] == pytest.approx(missed, abs=1e-4)


def test_what_was_not_measured_is_not_judged() -> None:
    for made in (row(None, Goal(1.0)), row(goal=Goal(1.0, "speed", ("gone",)))):
        assert made.told(HERE)["missed_by"] is None
    assert "not judged, nothing to compare with (gone not measured)" in row(goal=Goal(1.0, "speed", ("gone",))).line(HERE)
    assert "missed by 20 % (gone not measured)" in row(goal=Goal(1.0, "speed", ("gone", "fast"))).line(HERE)
    assert Goal(0.5, "read").missed_by(row(), Ceilings()) is None


def test_the_limit_that_takes_most_of_the_time_is_named() -> None:
    goal = Goal(10.0)
    bound = row(goal=goal, work={"bfloat16": 10e9, "float32": 1e9}, launches=3, more={"factorizations": 1.0})
    assert bound.least(HERE) == pytest.approx({"bytes": 0.5, "bfloat16 operations": 0.2, "launches": 0.06, "factorizations": 0.01})
    assert "none of these, limit it (of its time need bytes 50 %, bfloat16 operations 20 %" in bound.line(HERE)
    assert "bytes limit it (of its time need bytes 77 %" in row(65.0, goal).line(HERE)
    assert "no limits were measured" in row(goal=goal).line(Ceilings())
    assert "limit" not in row(5.0, goal).line(HERE)


def test_a_goal_missed_by_little_is_not_missed_by_nothing() -> None:
    assert "missed by 0.4 %" in row(goal=Goal(0.502, "read")).line(HERE)


@pytest.mark.parametrize("error", [2.0, math.nan])
def test_a_wrong_result_meets_no_goal(error: float) -> None:
    made = row(goal=Goal(1e9))
    made.error, made.allowed = error, 1.0
    assert not made.right
    assert "WRONG" in made.line(HERE)
    assert "not judged, the result is wrong" in made.line(HERE)
    assert made.told(HERE)["missed_by"] is None


def test_an_error_that_is_nan_is_the_worst() -> None:
    assert worst(1.0, 3.0, 2.0) == 3.0
    assert worst(3.0) == 3.0
    for errors in ((math.nan, math.inf), (math.inf, math.nan)):
        assert math.isnan(worst(*errors))


def test_a_row_that_fails_keeps_no_other_from_being_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> Row:
        raise ValueError("no memory")

    rows = going_on([row, fails, row])
    assert [next(rows).name, next(rows).name] == ["a product"] * 2
    with pytest.raises(RuntimeError, match="1 of the piece's rows failed"):
        next(rows)
    assert "ValueError: no memory" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1, 5, 256, 4096, 11008])
def test_rows_to_compare_are_from_everywhere(n: int) -> None:
    rows = range(n)[spread(n)]
    assert len(rows) <= 256
    assert {r // 128 for r in rows} == {r // 128 for r in range(n)}
    assert {r % 64 for r in rows} == {r % 64 for r in range(n)}, "a tile has a place that no row to compare is at"


def test_without_a_gpu_nothing_is_timed() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"no CUDA device; .*--dry"):
            Bench(dry=False)
