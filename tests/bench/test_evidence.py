"""The evidence table on made-up differences with a known truth, its bits against what is stored, and its names against the sweep."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bench import evidence
from bench.evidence_bits import _FORMULAS, bits_at
from bench.evidence_claims import CLAIMS, Claim
from bench.evidence_stats import (
    BLOCKS,
    DOCUMENTS,
    FEWEST_DOCUMENTS,
    HOLDS,
    REVERSED,
    UNCLEAR,
    Effect,
    adjusted,
    clustered,
    clusters,
    difference,
    effect,
)
from orchestrator.grid import compose_grid
from quant import quantize_linear
from quant.tensors import FORMATS
from tests.orchestrator import synthetic

WINDOWS = 32


def drawn(mean: float, *, draw: float = 0.0, seed: int = 0, draws: int = 3) -> np.ndarray:
    """`[R, n]` with text noise of 0.01 shared by all draws, and a shift of standard deviation `draw` per draw."""
    rng = np.random.default_rng(seed)
    return mean + rng.normal(0, 0.01, WINDOWS) + draw * rng.normal(0, 1, (draws, 1)) + rng.normal(0, 1e-4, (draws, WINDOWS))


def row(values: np.ndarray) -> evidence.Row:
    draws = {f"r{i}": v for i, v in enumerate(values)}
    return evidence.Row([3.0], [3.1], [3.0], nll=draws, kl={k: v + 1 for k, v in draws.items()})


def test_known_effects_give_the_three_verdicts() -> None:
    rows = {
        ("m", "good s"): row(drawn(-0.1, draw=0.005)),
        ("m", "bad s"): row(drawn(0.1, draw=0.005, seed=1)),
        ("m", "same s"): row(drawn(0.1, draw=0.005, seed=2)),
        ("m", "fixed s"): row(drawn(0.1, draws=1, seed=3)),
    }
    claims = [
        Claim(f"{a} s", f"{b} s", "") for a, b in (("good", "bad"), ("bad", "good"), ("same", "bad"), ("good", "fixed"), ("good", "gone"))
    ]
    found, unjudged = evidence.judge(rows, claims)
    assert [v.nll.verdict for v in found] == [HOLDS, REVERSED, UNCLEAR, HOLDS]
    assert [v.kl.verdict for v in found] == [v.nll.verdict for v in found]
    assert unjudged == ["good s < gone s"]
    assert found[0].nll.mean == pytest.approx(-found[1].nll.mean)


def test_the_interval_covers_the_truth_as_often_as_it_says_whether_text_or_draws_vary() -> None:
    # 300 trials of a true 95 %: fewer than 92 % (3 standard errors below) would be a defect. It may cover more, see the module.
    for draw in (0.0, 0.003, 0.02):
        hits = 0
        for seed in range(300):
            e = effect(drawn(0.05, draw=draw, seed=seed))
            hits += e.low <= 0.05 <= e.high
        assert hits / 300 > 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5, draw


def test_one_draw_is_the_paired_t_test_over_clusters() -> None:
    values = drawn(0.003, draws=1)
    e = effect(values)
    reference = stats.ttest_1samp(values[0].reshape(8, 4).mean(1), 0.0)
    assert e.p == pytest.approx(reference.pvalue, rel=1e-9)
    interval = reference.confidence_interval(0.95)
    assert (e.low, e.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert e.clusters == 8


def test_where_draws_alone_differ_it_is_the_t_test_over_draws() -> None:
    draws = np.array([0.4, 1.1, 0.7, 0.9])
    e = effect(np.repeat(draws[:, None], WINDOWS, axis=1))
    reference = stats.ttest_1samp(draws, 0.0)
    interval = reference.confidence_interval(0.95)
    assert (e.p, e.low, e.high) == pytest.approx((reference.pvalue, interval.low, interval.high), rel=1e-9)


def test_crossed_draws_and_text_are_two_variance_components_with_satterthwaites_freedom() -> None:
    draws, text = np.array([0.3, -0.5, 0.1]), np.array([0.2, 0.9, -0.4, 0.6, -0.1, 0.3, -0.8, 0.5])
    e = effect(1.0 + draws[:, None] + text.repeat(4))
    # Of a mean of three draws and eight blocks, each part known by itself.
    parts = [float(x.var(ddof=1)) / x.size for x in (draws, text)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 7)
    reach = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    mean = 1.0 + draws.mean() + text.mean()
    assert (e.mean, e.low, e.high) == pytest.approx((mean, mean - reach, mean + reach), rel=1e-9)
    assert e.p == pytest.approx(2 * stats.t.sf(mean / sum(parts) ** 0.5, freedom), rel=1e-9)


def test_draws_widen_the_interval_and_pairing_by_draw_narrows_it() -> None:
    a = drawn(0.0, draw=0.05)
    assert effect(a).high - effect(a).low > effect(a[:1]).high - effect(a[:1]).low
    paired = effect(difference(a + 0.01, a))
    assert (paired.low, paired.high) == pytest.approx((0.01, 0.01))


def test_clusters_are_consecutive_windows_and_the_last_takes_the_rest() -> None:
    means, share = clustered(np.arange(10.0)[None], clusters(10).of)
    assert (means.tolist(), share.tolist()) == ([[1.5, 6.5]], [0.4, 0.6])
    assert clusters(3).of.tolist() == [0, 0, 0]


def documents(count: int) -> np.ndarray:
    """`[n]`: documents of differing lengths."""
    of = np.sort(np.random.default_rng(count).integers(0, count, WINDOWS - count))
    return np.sort(np.concatenate([of, np.arange(count)])).astype(float)


def test_one_draw_over_documents_is_the_cluster_robust_regression_of_statsmodels() -> None:
    from statsmodels.regression.linear_model import OLS

    values, of = drawn(0.003, draws=1), documents(12)
    e = effect(values, of)
    fit = OLS(values[0], np.ones(WINDOWS)).fit(cov_type="cluster", cov_kwds={"groups": of.astype(int)}, use_t=True)
    assert (e.clusters, e.clusters_are) == (12, DOCUMENTS)
    assert e.p == pytest.approx(float(fit.pvalues[0]), rel=1e-6)
    assert (e.low, e.high) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-6)


def test_documents_of_one_window_are_the_paired_t_test_over_windows() -> None:
    values = drawn(0.003, draws=1)
    e = effect(values, np.arange(WINDOWS, dtype=float))
    assert e.p == pytest.approx(stats.ttest_1samp(values[0], 0.0).pvalue, rel=1e-9)


def test_few_documents_leave_blocks_and_the_line_says_so() -> None:
    values, few, enough = drawn(0.003), documents(FEWEST_DOCUMENTS - 1), documents(FEWEST_DOCUMENTS)
    assert effect(values, few) == effect(values)
    assert effect(values).clusters_are == BLOCKS
    assert evidence.resampled({"nll": values[0]}) == "8 blocks of 4 windows, since windows do not tell their documents"
    assert evidence.resampled({"nll": values[0], "document": few}).endswith("since windows are of 7 documents, fewer than 8")
    assert evidence.resampled({"nll": values[0], "document": enough}) == "8 documents"


def test_equal_variants_are_not_distinguishable_and_holm_takes_all_rows_into_account() -> None:
    same = effect(np.zeros((1, WINDOWS)))
    assert (same.mean, same.p) == (0.0, 1.0)
    weak = Effect(-1.0, -2.0, 0.0, 0.04, 1, 8)
    assert adjusted([weak])[0].verdict == HOLDS
    assert [e.verdict for e in adjusted([weak, same])] == [UNCLEAR, UNCLEAR]
    assert adjusted([]) == []


def test_values_that_are_not_finite_or_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        effect(np.full((1, WINDOWS), np.nan))
    with pytest.raises(ValueError, match="make 1 cluster"):
        effect(np.zeros((1, 6)))
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(np.zeros((2, 8)), np.zeros((3, 8)))


STORED = {
    "rtn": {"bits": 3, "group_size": 32},
    "rtn_channel": {"method": "rtn", "bits": 4},
    "gptq": {"bits": 2, "group_size": 32, "act_order": True},
    "nf4": {"bits": 4, "group_size": 32, "number": "nf4_dq"},
    "nvfp4": {"method": "rtn", "bits": 4, "group_size": 16, "number": "nvfp4"},
    "hqq": {"bits": 4, "group_size": 32, "axis": 0},
    "owq": {"bits": 3},
    "quik": {"bits": 4},
    "billm": {"bits": 1, "block_size": 32},
    "billm_joint": {"bits": 1, "block_size": 32},
    "pb_llm": {"bits": 1, "group_size": 32},
    "claq": {"bits": 2, "adaptive_bits": 2.5, "outlier_reservation": True},
    "slim_llm": {"bits": 2, "group_size": 32},
    "spqr": {"bits": 3, "group_size": 16},
    "squeezellm": {"bits": 3},
    "quip": {"bits": 2},
    "quip_sharp": {"bits": 2, "tune_iters": 1},
}


@pytest.mark.parametrize("name", STORED)
def test_bits_at_its_own_shape_are_what_a_tensor_stores(name: str) -> None:
    n, k = 64, 128
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(n, k, generator=g), torch.randn(2, 96, k, generator=g)
    stored = quantize_linear(w, **{"method": name, "inputs": x, "scale_dtype": "float16", **STORED[name]})
    # Every bit stream ends on a whole byte.
    assert 0 <= stored.bits_stored - bits_at(stored, n, k) + 1e-9 <= 8 * len(stored.pack()) / (n * k) + 2e-9


def test_every_stored_format_has_a_formula() -> None:
    assert set(_FORMULAS) == set(FORMATS.values())


def test_large_matrices_take_the_bits_that_papers_count() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    groups = quantize_linear(w, method="rtn", bits=4, group_size=64, scale_dtype="float16")
    assert bits_at(groups, 4096, 4096) == pytest.approx(4 + 20 / 64)
    rows = quantize_linear(w, method="rtn", bits=4, scale_dtype="float16")
    assert bits_at(rows, 4096, 4096) == pytest.approx(4 + 20 / 4096)
    with pytest.raises(TypeError, match="no formula for the stored format int"):
        bits_at(3, 64, 64)


def test_every_ordering_names_variants_of_the_sweep() -> None:
    grid = compose_grid(["sweep=methods"], multirun=True)
    names = {f"{evidence.short(c.method.name)} {c.scheme.name}" for c in grid.cells}
    assert {n for c in CLAIMS for n in (c.better, c.worse)} <= names
    assert {c.replicate.name for c in grid.cells} == {"r0", "r1", "r2"}
    assert {c.task.values["windows"] for c in grid.cells} == {"spread"}


def test_the_committed_table_has_every_row_of_the_sweep_or_says_that_it_is_missing() -> None:
    text = (Path(evidence.__file__).parent / "results" / "evidence.md").read_text(encoding="utf-8")
    sections = {s.partition("\n")[0]: s for s in re.split(r"^## ", text, flags=re.MULTILINE)}
    for cell in compose_grid(["sweep=methods"], multirun=True).cells:
        model, name = cell.model.name, f"{evidence.short(cell.method.name)} {cell.scheme.name}"
        lines = [line for line in text.splitlines() if line.startswith(f"- {model}")]
        named = [line for line in lines if name in line.removeprefix(f"- {model}: ").split(", ") or line.startswith(f"- {model} {name}: ")]
        assert (f"\n| {name} | " in sections[model]) is (not named), (model, name)


@pytest.mark.parametrize("count", [None, 20])
def test_a_sweep_becomes_a_table(count: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = synthetic.sweep(
        tmp_path, tasks=(synthetic.DIVERGENCE,), replicates=("r0", "r1", "r2"), fail={("awq", "w2a16_g64")}, documents=count
    )
    monkeypatch.setattr(evidence, "large_bits", lambda _: 4.25)  # synthetic stages have no tensors
    rows, failures = evidence.collect(made)
    assert len(rows) == 11
    assert failures == ["wikitext_llama awq w2a16_g64: r0, r1, r2 GPTQ: the Hessian is not positive definite"]
    verdicts, unjudged = evidence.judge(rows)
    assert {v.nll.verdict for v in verdicts if v.claim.better.startswith("gptq")} == {HOLDS}
    assert "spqr w3a16_g16 < gptq w3a16_g16" in unjudged
    table = evidence.variant_lines(rows, "wikitext_llama")
    assert len(table) == 2 + len(rows)
    assert all("| 3 |" in line and "4.25" in line for line in table[2:])
    evidence.write_csv(tmp_path / "evidence.csv", rows, verdicts)
    with (tmp_path / "evidence.csv").open() as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == len(rows) + len(verdicts)
    assert all(line["nll_mean"] for line in lines)
    assert {(line["clusters"], line["clusters_are"]) for line in lines} == {("15", BLOCKS) if count is None else ("20", DOCUMENTS)}
