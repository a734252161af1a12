"""What to pick is judged by all replicates of a method, scheme and calibration, not by the luckiest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_ind

from orchestrator.report import write_report
from orchestrator.report.choices import Contender, Standing, best_per_width, standings
from orchestrator.report.heat import heat_map
from orchestrator.report.overview import ModelTable, model_tables
from orchestrator.report.tables import long_table
from orchestrator.results import SweepResult
from orchestrator.stats import over_replicates
from tests.orchestrator import synthetic

TASK = synthetic.PERPLEXITY
FINITE = st.integers(-900, 900).map(lambda n: n / 100)


def sweep_of(folder: Path, losses: Mapping[str, Sequence[float]]) -> SweepResult:
    """Method ▸ nats per token that each of its replicates loses, on the same noise."""
    replicates = [f"r{i}" for i in range(max(map(len, losses.values())))]
    result = synthetic.sweep(folder, methods=tuple(losses), schemes=("w4a16_g64",), tasks=(TASK,), replicates=replicates)
    variants = [v for v in result.variants if v.is_baseline]
    for method, each in losses.items():
        mine = [v for v in result.variants if v.axes["method"] == method]
        for variant, loss in zip(mine, each, strict=False):
            items = synthetic.perplexity_items(1, loss)
            stage = synthetic.evaluate_stage(folder, f"{variant.label} {loss}", TASK, items)
            variants.append(replace(variant, evaluations={TASK.name: stage}))
    return replace(result, variants=tuple(variants))


def table_of(result: SweepResult) -> ModelTable:
    (model,) = model_tables(result, long_table(result))
    return model


def best(result: SweepResult) -> Contender:
    return best_per_width(table_of(result))[4.0][TASK.name].best


LUCKY = {"gptq": (0.01, 0.30, 0.32), "awq": (0.10, 0.11, 0.12)}


def test_one_lucky_replicate_is_not_the_best(tmp_path: Path) -> None:
    result = sweep_of(tmp_path, LUCKY)
    found = best(result)
    values = [r.value for r in long_table(result) if r.method == "awq" and r.is_primary]
    assert found.name == "awq · w4a16_g64"
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    page = write_report(result, tmp_path / "report").html.read_text(encoding="utf-8")
    assert f"mean of 3 replicates, {min(values):.2f} to {max(values):.2f}" in page
    assert "Judged by the mean of replicates" in page


def test_the_front_is_of_means_and_holds_no_lucky_replicate(tmp_path: Path) -> None:
    found = {c.name: s for c, s in standings(table_of(sweep_of(tmp_path, LUCKY)), TASK)}
    # All sizes are the same; the mean of GPTQ is beaten, but its replicates differ by more than that.
    assert found == {"awq · w4a16_g64": Standing.FRONT, "gptq · w4a16_g64": Standing.CLOSE, "unquantized": Standing.FRONT}


def test_replicates_that_agree_are_told_apart_and_those_that_do_not_are_tied(tmp_path: Path) -> None:
    near, far = (
        best_per_width(table_of(sweep_of(tmp_path / n, losses)))[4.0][TASK.name]
        for n, losses in (
            ("near", {"gptq": (0.10, 0.101, 0.102), "awq": (0.12, 0.121, 0.122)}),
            ("far", {"gptq": (0.06, 0.101, 0.142), "awq": (0.08, 0.121, 0.162)}),
        )
    )
    assert (near.best.name, near.tied) == ("gptq · w4a16_g64", ())
    assert (far.best.name, far.tied) == ("gptq · w4a16_g64", ("awq · w4a16_g64",))


def test_a_method_whose_replicates_are_one_variant_is_judged_by_it(tmp_path: Path) -> None:
    result = sweep_of(tmp_path, {"rtn": (0.05,), "gptq": (0.10, 0.101, 0.102)})
    found = best(result)
    row = next(r for r in long_table(result) if r.method == "rtn" and r.is_primary)
    assert (found.name, found.value, found.replicates) == ("rtn · w4a16_g64", row.value, "")
    assert found.difference == (row.delta, row.low, row.high)
    shown = write_report(result, tmp_path / "report").html.read_text(encoding="utf-8")
    (drawn,) = re.findall(r'data-plot="pareto-0">(.*?)</script>', shown)
    assert {t.split("</b>")[0] for trace in json.loads(drawn)["data"] for t in trace.get("hovertext", ())} == {
        "<b>unquantized",
        "<b>rtn · w4a16_g64",  # of its replicates it is one alone, but for all
        "<b>gptq · w4a16_g64",
    }


def test_a_mean_of_equal_widths_is_that_width(tmp_path: Path) -> None:
    """Three times 3.3 divided by 3 is another number, which got a row of its own."""
    result = sweep_of(tmp_path, {"rtn": (0.05,), "gptq": (0.10, 0.101, 0.102)})
    table = table_of(result)
    table = replace(table, lines=tuple(replace(x, bits_nominal=None if x.variant.is_baseline else 3.3) for x in table.lines))
    assert list(best_per_width(table)) == [3.3]


def test_failed_replicates_are_counted_and_one_that_overflowed_is_never_best(tmp_path: Path) -> None:
    result = sweep_of(tmp_path, LUCKY)
    awq = [v for v in result.variants if v.axes["method"] == "awq"]
    lost = replace(awq[0], evaluations={TASK.name: synthetic.failed(awq[0].evaluations[TASK.name])})
    some = replace(result, variants=tuple(lost if v is awq[0] else v for v in result.variants))
    assert best(some).replicates.startswith("mean of 2 of 3 replicates, ")
    (task,) = table_of(some).tasks
    assert "mean of 2 of 3 replicates" in heat_map(table_of(some), task)
    bad = synthetic.evaluate_stage(tmp_path, "overflow", TASK, synthetic.perplexity_items(1, 1e6))
    worse = replace(awq[0], evaluations={TASK.name: bad})
    overflowed = replace(result, variants=tuple(worse if v is awq[0] else v for v in result.variants))
    assert best(overflowed).name == "gptq · w4a16_g64"


@given(FINITE, st.floats(0, 5), st.floats(0, 5), FINITE)
def test_one_replicate_keeps_its_interval(delta: float, below: float, above: float, score: float) -> None:
    assert over_replicates([(delta, delta - below, delta + above)], [score], [score]) == (delta, delta - below, delta + above)


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy says so of replicates that are equal
@given(st.lists(FINITE, min_size=2, max_size=5), st.lists(FINITE, min_size=2, max_size=5))
def test_the_share_of_draws_is_welchs_t_interval(a: list[float], b: list[float]) -> None:
    """Where text adds nothing, the interval is scipy's; where it adds more, variances add."""
    if max(np.var(a, ddof=1), np.var(b, ddof=1)) < 1e-6:
        return
    exact = ttest_ind(b, a, equal_var=False).confidence_interval(0.9)
    pairs = [(y - x, y - x, y - x) for x in a for y in b]
    delta, low, high = over_replicates(pairs, a, b, confidence=0.9)
    # Sums of at most 25 numbers below 20 in size: rounding stays below 1e-13.
    assert (delta, low, high) == pytest.approx((np.mean(b) - np.mean(a), exact.low, exact.high), rel=1e-9, abs=1e-9)
    wider = over_replicates([(d, d - 1, d + 2) for d, _, _ in pairs], a, b, confidence=0.9)
    assert wider[1:] == pytest.approx((delta - math.hypot(delta - low, 1), delta + math.hypot(high - delta, 2)), rel=1e-9)
    one = over_replicates([(x, x, x) for x in a], a, confidence=0.9)
    if np.var(a, ddof=1) > 1e-6:
        alone = ttest_1samp(a, 0.0).confidence_interval(0.9)
        assert one[1:] == pytest.approx((alone.low, alone.high), rel=1e-9, abs=1e-9)


def test_perplexities_of_broken_models_have_intervals_too() -> None:
    delta, low, high = over_replicates([(1e200, 1e200, 1e200), (3e200, 3e200, 3e200)], [1e200, 3e200])
    assert delta == 2e200
    assert high - delta == pytest.approx(delta - low)
    assert high - delta == pytest.approx(12.7062 * 1e200, rel=1e-5)  # t of one degree of freedom × standard error


def test_no_interval_stays_none() -> None:
    assert all(map(math.isnan, over_replicates([(1.0, math.nan, math.nan), (2.0, 1.0, 3.0)], [1.0, 2.0])[1:]))
