"""Paired differences: against independent references, on simulated data with a known truth, and at the edges."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import intervals, stats
from orchestrator.errors import PairingError
from orchestrator.results import StageResult
from orchestrator.stage import Status
from tests.orchestrator import synthetic


def stage(root: Path, label: str, items: dict[str, object], task: object = synthetic.PERPLEXITY) -> StageResult:
    return synthetic.evaluate_stage(root, label, task, items)


def test_perplexity_delta_is_the_difference_of_the_summary_scores(tmp_path: Path) -> None:
    a = stage(tmp_path, "a", synthetic.perplexity_items(1, 0.1))
    b = stage(tmp_path, "b", synthetic.perplexity_items(2, 0.0))
    d = stats.paired_delta(a, b, synthetic.PERPLEXITY, "ppl")
    scores = [s.summary["scores"]["ppl"] for s in (a, b)]
    assert d.value == pytest.approx(scores[0], rel=1e-12)
    assert d.delta == pytest.approx(scores[0] - scores[1], rel=1e-9)
    assert d.low < d.delta < d.high
    assert (d.n_items, d.method) == (60, "bca")


def test_an_interval_has_the_confidence_and_the_draws_asked_for(tmp_path: Path) -> None:
    items, base = synthetic.perplexity_items(1, 0.1), synthetic.perplexity_items(2, 0.0)
    v, b = stage(tmp_path, "v", items), stage(tmp_path, "b", base)
    for asked in ({}, {"confidence": 0.5}, {"confidence": 0.99}, {"seed": 3}):
        d = stats.paired_delta(v, b, synthetic.PERPLEXITY, "ppl", **asked)
        assert d == intervals.compare(items["nll"], base["nll"], items["weight"], "ppl", **asked)
    for percent in (0, 1, 95):
        with pytest.raises(ValueError, match=f"confidence={percent} is not between 0 and 1"):
            stats.paired_delta(v, b, synthetic.PERPLEXITY, "ppl", confidence=percent)


def test_pairing_narrows_the_interval_against_two_separate_scores(tmp_path: Path) -> None:
    a, b = synthetic.perplexity_items(1, 0.05), synthetic.perplexity_items(2, 0.0)
    d = intervals.compare(a["nll"], b["nll"], a["weight"], "nll")
    unpaired = scipy.stats.ttest_ind(a["nll"], b["nll"]).confidence_interval(0.95)
    assert (d.high - d.low) < (unpaired.high - unpaired.low) / 10


@pytest.mark.parametrize("n", [5, 400])
def test_agrees_with_scipys_t_interval_and_p_value_on_normal_data(n: int) -> None:
    rng = np.random.default_rng(7)
    v, b = rng.normal(1.0, 1.0, n), rng.normal(0.9, 1.0, n)
    d = intervals.compare(v, b, np.ones(n), "kl")
    reference = scipy.stats.ttest_rel(v, b)
    interval = reference.confidence_interval(0.95)
    assert d.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    if n < intervals.FEWEST_TO_RESAMPLE:
        assert d.method == "t"
        assert (d.low, d.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    else:
        # An endpoint is a 2.5 % quantile of 2000 draws: its standard error is sqrt(.025·.975/2000)/φ(1.96) = 0.06 standard
        # errors of the mean; four of these, and 1/√n for the skewness that BCa corrects and t does not.
        slack = (4 * 0.06 + 1 / math.sqrt(n)) * float(scipy.stats.sem(v - b))
        assert (d.low, d.high) == pytest.approx((interval.low, interval.high), abs=slack)


def test_agrees_with_scipys_bca_of_the_perplexity_difference() -> None:
    items = [synthetic.perplexity_items(s, x, 200) for s, x in ((1, 0.4), (2, 0.0))]
    weight = np.random.default_rng(0).integers(100, 2000, 200).astype(float)

    def difference(v: np.ndarray, b: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        total = w.sum(axis)
        return np.exp((w * v).sum(axis) / total) - np.exp((w * b).sum(axis) / total)

    data = (items[0]["nll"], items[1]["nll"], weight)
    reference = scipy.stats.bootstrap(data, difference, paired=True, vectorized=True, n_resamples=intervals.RESAMPLES, method="BCa", rng=1)
    d = intervals.compare(items[0]["nll"], items[1]["nll"], weight, "ppl")
    interval = reference.confidence_interval
    # Two independent sets of draws: each endpoint has 0.06 standard errors of Monte Carlo noise (see above); four joint ones.
    slack = 4 * math.sqrt(2) * 0.06 * float(reference.standard_error)
    assert d.method == "bca"
    assert (d.low, d.high) == pytest.approx((interval.low, interval.high), abs=slack)


@pytest.mark.parametrize(("metric", "n"), [("ppl", 8), ("ppl", 80), ("kl", 80)])
def test_interval_covers_the_truth_as_often_as_it_says(metric: str, n: int) -> None:
    rng = np.random.default_rng(11)
    trials, covered, falsely_rejected = 1000, 0, 0
    weight = np.ones(n)
    for _ in range(trials):
        text = rng.normal(2.0, 0.5, n)
        if metric == "kl":  # skewed, the baseline is exactly zero
            d = intervals.compare(rng.gamma(2.0, 0.5, n), np.zeros(n), weight, metric, resamples=999)
            covered += d.low <= 1.0 <= d.high
        else:
            d = intervals.compare(text + rng.normal(0.1, 0.2, n), text, weight, metric, resamples=999)
            # The texts at hand are drawn too, so the truth is that of the whole population of texts.
            covered += d.low <= math.exp(2.1) - math.exp(2.0) <= d.high
            same = intervals.compare(text + rng.normal(0.0, 0.2, n), text, weight, metric, resamples=2)
            falsely_rejected += same.p_value < 0.05
    # Coverage error of BCa and of a t interval on skewed data is O(1/n); the rest is binomial, four standard deviations.
    noise = 4 * math.sqrt(0.05 * 0.95 / trials)
    assert abs(covered / trials - 0.95) <= noise + 1.0 / n
    assert falsely_rejected / trials <= 0.05 + noise


def clustered(seed: int, documents: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(variant, baseline, weight, document) of 1 to 9 windows per document; a document's windows share most of their noise."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(documents), rng.integers(1, 10, documents)).astype(float)
    text = rng.normal(2.0, 0.5, documents)[of.astype(int)] + rng.normal(0, 0.1, of.size)
    shift = rng.normal(0.1, 0.2, documents)[of.astype(int)] + rng.normal(0, 0.05, of.size)
    return text + shift, text, rng.integers(100, 2000, of.size).astype(float), of


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["ppl", "kl"]), st.integers(9, 40))
def test_one_item_per_document_gives_what_items_give(seed: int, metric: str, n: int) -> None:
    rng = np.random.default_rng(seed)
    v, b, w = rng.normal(1.1, 0.3, n), rng.normal(1.0, 0.3, n), rng.integers(1, 9, n).astype(float)
    d = intervals.compare(v, b, w, metric, documents=rng.permutation(n).astype(float), resamples=99)
    assert (d.unit, d.n_documents) == (stats.Unit.DOCUMENT, n)
    assert replace(d, unit=stats.Unit.ITEM, n_documents=None) == intervals.compare(v, b, w, metric, resamples=99)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["ppl", "kl"]), st.integers(8, 11) | st.integers(20, 30), st.integers(2, 6))
def test_equal_windows_of_a_document_count_once(seed: int, metric: str, n: int, windows: int) -> None:
    rng = np.random.default_rng(seed)
    v, b, w = rng.normal(1.1, 0.3, n), rng.normal(1.0, 0.3, n), rng.integers(1, 9, n).astype(float)
    of = np.arange(n).repeat(windows)
    # Fewer than 12 are not resampled; from 20 on no resample holds every unit once, whose score would equal the whole's but for rounding.
    once = intervals.compare(v, b, w, metric, resamples=99)
    d = intervals.compare(v[of], b[of], w[of], metric, documents=of.astype(float), resamples=99)
    assert (d.delta, d.low, d.high, d.p_value) == pytest.approx((once.delta, once.low, once.high, once.p_value), rel=1e-9)
    assert d.method == once.method
    assert (d.n_items, d.n_documents) == (n * windows, n)


def test_windows_that_are_alike_widen_the_interval_by_the_root_of_their_number() -> None:
    rng = np.random.default_rng(3)
    n, windows = 300, 4
    v, of = rng.normal(0.1, 1.0, n), np.arange(n).repeat(windows)
    zero, ones = np.zeros(of.size), np.ones(of.size)
    wide = intervals.compare(v[of], zero, ones, "kl", documents=of.astype(float))
    narrow = intervals.compare(v[of], zero, ones, "kl")
    # An interval's length has the Monte Carlo noise of two endpoints, 0.06 standard errors each of the 3.92 it is long (see above);
    # four standard deviations of the ratio of two such lengths, and 1/n for the degrees of freedom.
    slack = 4 * math.sqrt(2) * math.sqrt(2) * 0.06 / 3.92 + 1 / n
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(math.sqrt(windows), rel=slack)


@pytest.mark.parametrize("documents", [8, 11, 20])
def test_agrees_with_the_cluster_robust_regression_of_statsmodels(documents: int) -> None:
    from statsmodels.regression.linear_model import WLS

    v, b, w, of = clustered(5, documents)
    d = intervals.compare(v, b, w, "kl", documents=of)
    fit = WLS(v - b, np.ones(of.size), weights=w).fit(cov_type="cluster", cov_kwds={"groups": of.astype(int)}, use_t=True)
    assert d.delta == pytest.approx(float(fit.params[0]), rel=1e-9)
    assert d.p_value == pytest.approx(float(fit.pvalues[0]), rel=1e-6)
    if documents < intervals.FEWEST_TO_RESAMPLE:
        assert d.method == "t"
        assert (d.low, d.high) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-6)
        # Perplexities: at an end, the mean NLLs are that many standard errors off. The lower perplexity is held; d exp(m) = exp(m) dm.
        d = intervals.compare(v, b, w, "ppl", documents=of)
        nll = [float(np.average(x, weights=w)) for x in (v, b)]
        for end in (d.low, d.high):
            shift = math.log1p(end / d.baseline) if end > 0 else -math.log1p(-end / d.value)
            share = (1.0, math.exp(-shift)) if shift > 0 else (math.exp(shift), 1.0)
            added = share[0] * (v - nll[0]) - share[1] * (b - nll[1])
            fit = WLS(added, np.ones(of.size), weights=w).fit(cov_type="cluster", cov_kwds={"groups": of.astype(int)}, use_t=True)
            off = abs(nll[0] - nll[1] - shift) / float(fit.bse[0])
            assert off == pytest.approx(float(scipy.stats.t.ppf(0.975, documents - 1)), rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 11), st.floats(0, 0.3), st.floats(1e-3, 0.3))
def test_few_perplexities_have_an_interval_that_holds_0_where_their_p_value_says_so(seed: int, n: int, shift: float, spread: float) -> None:
    """Texts differ by more than models do."""
    rng = np.random.default_rng(seed)
    b = rng.normal(4.0, 1.0, n)
    v, w = b + rng.normal(shift, spread, n), rng.integers(100, 2000, n).astype(float)
    d, back = intervals.compare(v, b, w, "ppl"), intervals.compare(b, v, w, "ppl")
    assert d.low < d.delta < d.high
    assert (d.low <= 0 <= d.high) == (d.p_value >= 0.05)
    assert (-back.high, -back.low, back.p_value) == pytest.approx((d.low, d.high, d.p_value), rel=1e-6)


def test_agrees_with_scipys_bca_over_documents() -> None:
    v, b, w, of = clustered(7, 40)
    sums = [np.array([x[of == i].sum() for i in range(40)]) for x in (w * v, w * b, w)]

    def difference(wv: np.ndarray, wb: np.ndarray, ws: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(wv.sum(axis) / ws.sum(axis)) - np.exp(wb.sum(axis) / ws.sum(axis))

    draws = {"n_resamples": intervals.RESAMPLES, "method": "BCa", "rng": 1}
    reference = scipy.stats.bootstrap(tuple(sums), difference, paired=True, vectorized=True, **draws)
    d = intervals.compare(v, b, w, "ppl", documents=of)
    slack = 4 * math.sqrt(2) * 0.06 * float(reference.standard_error)  # as above
    assert d.method == "bca"
    assert (d.low, d.high) == pytest.approx(tuple(reference.confidence_interval), abs=slack)


def test_interval_over_documents_covers_the_truth_where_that_over_windows_does_not() -> None:
    rng = np.random.default_rng(13)
    trials, documents, windows = 500, 11, 6
    of = np.arange(documents).repeat(windows)
    covered = {True: 0, False: 0}
    for _ in range(trials):
        v = rng.normal(0.1, 0.2, documents)[of] + rng.normal(0, 0.05, of.size)
        for known in covered:
            d = intervals.compare(v, 0 * v, np.ones(of.size), "kl", documents=of.astype(float) if known else None, resamples=199)
            covered[known] += d.low <= 0.1 <= d.high
    assert abs(covered[True] / trials - 0.95) <= 4 * math.sqrt(0.05 * 0.95 / trials)  # normal data: t is exact, the rest is binomial
    assert covered[False] / trials < 0.75  # too short by nearly √6: 1.96 becomes 0.8, which covers 58 %


def test_few_documents_leave_items_the_unit_and_either_record_may_tell(tmp_path: Path) -> None:
    items, base = synthetic.perplexity_items(1, 0.2), synthetic.perplexity_items(2, 0.0)
    plain = stats.paired_delta(stage(tmp_path, "v", items), stage(tmp_path, "b", base), synthetic.PERPLEXITY, "ppl")
    assert (plain.unit, plain.n_documents, plain.n_items) == (stats.Unit.ITEM, None, 60)
    for count in (stats.FEWEST_DOCUMENTS - 1, stats.FEWEST_DOCUMENTS):
        documents = np.arange(60) * count // 60
        told = [stage(tmp_path, f"{k}{count}", {**x, "document": documents}) for k, x in (("v", items), ("b", base))]
        untold = [stage(tmp_path, k, x) for k, x in (("v", items), ("b", base))]
        found = [stats.paired_delta(v, b, synthetic.PERPLEXITY, "ppl") for v, b in (told, (told[0], untold[1]), (untold[0], told[1]))]
        assert found[0] == found[1] == found[2]
        if count < stats.FEWEST_DOCUMENTS:
            assert found[0] == replace(plain, n_documents=count)
        else:
            assert (found[0].unit, found[0].n_documents, found[0].n_items) == (stats.Unit.DOCUMENT, count, 60)
            assert found[0].delta == plain.delta


def test_identical_items_give_an_exact_zero(tmp_path: Path) -> None:
    items = synthetic.perplexity_items(1, 0.0)
    d = stats.paired_delta(stage(tmp_path, "a", items), stage(tmp_path, "b", items), synthetic.PERPLEXITY, "ppl")
    assert (d.delta, d.low, d.high, d.p_value, d.method) == (0.0, 0.0, 0.0, 1.0, "identical")


def test_no_spread_a_single_item_and_scores_that_are_not_finite_are_named() -> None:
    ones = np.ones(20)
    d = intervals.compare(ones, 0 * ones, ones, "flips")
    assert (d.method, d.low, d.delta, d.high) == ("degenerate", 1.0, 1.0, 1.0)
    assert d.p_value == 2.0**-19
    single = intervals.compare(ones[:1], 0 * ones[:1], ones[:1], "kl")
    assert single.method == "single"
    assert math.isnan(single.low)
    for bad in (math.nan, math.inf, 1e6):  # exp(1e6) overflows
        for sides in ((ones * bad, ones), (ones, ones * bad)):
            d = intervals.compare(*sides, ones, "ppl")
            assert d.method == "undefined"
            assert math.isnan(d.p_value)
    nothing = intervals.compare(ones, ones, 0 * ones, "kl")
    assert (nothing.method, nothing.n_items) == ("undefined", 0)


@pytest.mark.parametrize("unit", [1e-200, 1e-14, 1e200])
def test_values_of_any_unit_have_the_interval_of_those_near_one(unit: float) -> None:
    kl = np.random.default_rng(0).gamma(4.0, 0.25, 40)
    found, plain = (intervals.compare(kl * u, 0 * kl, np.ones(40), "kl") for u in (unit, 1.0))
    # Beyond 1e100 the acceleration, a quotient of cubes, is lost.
    assert found.method == ("bca" if unit == 1e-14 else "percentile")
    assert found.p_value == pytest.approx(plain.p_value, rel=1e-9, abs=0)
    if unit == 1e-14:
        assert (found.low / unit, found.high / unit) == pytest.approx((plain.low, plain.high), rel=1e-9)
    assert 0 < found.low < found.delta < found.high


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(12, 40))
def test_turning_a_difference_round_turns_its_interval_round(seed: int, n: int) -> None:
    """Of few values, as flips have: many resamples then give the very difference that was found."""
    v, b = np.random.default_rng(seed).integers(0, 2, (2, n)).astype(float)
    there, back = intervals.compare(v, b, np.ones(n), "flips"), intervals.compare(b, v, np.ones(n), "flips")
    assert there.method in ("bca", "identical", "degenerate")
    assert (back.method, back.p_value) == (there.method, pytest.approx(there.p_value, rel=1e-12))
    # Differences are multiples of 1 / n, so that a rounding error changes ends by as much at most.
    assert (-back.high, -back.delta, -back.low) == pytest.approx((there.low, there.delta, there.high), abs=1e-12)


def test_one_item_that_differs_among_many_still_has_an_interval() -> None:
    v = np.zeros(800)
    v[5] = 1.0
    d = intervals.compare(v, np.zeros(800), np.ones(800), "flips")
    assert 0 <= d.low <= d.delta <= d.high <= 1
    assert d.p_value > 0.05


def test_items_are_paired_by_id_not_by_position(tmp_path: Path) -> None:
    items, base = synthetic.perplexity_items(1, 0.2), synthetic.perplexity_items(2, 0.0)
    base["document"] = np.arange(60) // 3
    order = np.random.default_rng(0).permutation(60)
    shuffled = {k: np.asarray(v)[order] for k, v in base.items()}
    straight = stats.paired_delta(stage(tmp_path, "v", items), stage(tmp_path, "b", base), synthetic.PERPLEXITY, "ppl")
    mixed = stats.paired_delta(stage(tmp_path, "v", items), stage(tmp_path, "s", shuffled), synthetic.PERPLEXITY, "ppl")
    assert (mixed.delta, mixed.low, mixed.high) == pytest.approx((straight.delta, straight.low, straight.high), rel=1e-12)


def test_items_that_differ_are_refused_with_the_reason(tmp_path: Path) -> None:
    items = synthetic.perplexity_items(1, 0.2)
    items["document"] = np.arange(60)
    good = stage(tmp_path, "good", items)

    def against(label: str, **changed: object) -> StageResult:
        return stage(tmp_path, label, {**items, **changed})

    cases = [
        (against("other", id=["x", *items["id"][1:]]), "60 against 60; 'w0000' is in one only"),
        (stage(tmp_path, "short", {k: v[:30] for k, v in items.items()}), "60 against 30"),
        (against("twice", id=[*items["id"][:59], "w0000"]), "item ids repeat"),
        (against("weights", weight=np.full(60, 3.0)), "different weights"),
        (against("documents", document=np.arange(60) + 1), "different documents"),
    ]
    for bad, message in cases:
        with pytest.raises(PairingError, match=message):
            stats.paired_delta(good, bad, synthetic.PERPLEXITY, "ppl")
    with pytest.raises(PairingError, match="item ids repeat"):
        stats.paired_delta(cases[2][0], good, synthetic.PERPLEXITY, "ppl")
    longer = rf"30 against 60; {items['id'][30]!r} is in one only"
    with pytest.raises(PairingError, match=longer):
        stats.paired_delta(cases[1][0], good, synthetic.PERPLEXITY, "ppl")
    with pytest.raises(PairingError, match=r"hold no 'kl'.*they hold nll"):
        stats.paired_delta(good, good, synthetic.PERPLEXITY, "kl")
    with pytest.raises(PairingError, match="FAILED and has no items"):
        stats.paired_delta(replace(good, status=Status.FAILED, payload=None), good, synthetic.PERPLEXITY, "ppl")


def test_columns_that_are_missing_are_named_beside_those_there_are(tmp_path: Path) -> None:
    numbers = np.arange(9)

    def against_itself(label: str, **items: object) -> stats.Delta:
        made = synthetic.write_stage(tmp_path, "evaluate", label, summary={}, tables={"items.parquet": items})
        return stats.paired_delta(made, made, synthetic.DIVERGENCE, "kl")

    with pytest.raises(PairingError, match=r"has no column id, weight; it has kl, nll$"):
        against_itself("bare", kl=numbers, nll=numbers)
    with pytest.raises(PairingError, match=r"they hold flips, nll, tail$"):
        against_itself("words", id=numbers, weight=numbers, word=["a"] * 9, tail=numbers, nll=numbers, flips=numbers)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_matches_its_definition(p_values: list[float]) -> None:
    ranked = sorted(p_values)
    for given_p, adjusted in zip(p_values, stats.holm(p_values), strict=True):
        steps = [min(1.0, (len(ranked) - i) * p) for i, p in enumerate(ranked) if p <= given_p]
        assert adjusted == pytest.approx(max(steps))


def test_holm_equals_that_of_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p_values = [*(random.Random(0).random() ** 4 for _ in range(40)), 0.0, 1.0, 0.01, 0.01]
    want = multipletests(p_values, method="holm")[1]
    assert stats.holm(p_values) == pytest.approx(want.tolist())


def test_the_driver_can_import_statistics_without_the_heavy_libraries() -> None:
    heavy = ("torch", "numpy", "scipy", "pandas", "pyarrow", "statsmodels", "plotly")
    code = f"import sys, orchestrator.stats, orchestrator.report; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
