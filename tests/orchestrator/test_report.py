"""The report says what the sweep holds: every cell, the same numbers everywhere, nothing from outside."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from rich.console import Console

from orchestrator.report import print_table, write_report
from orchestrator.report.choices import Standing, best_per_width, pareto_front, standings
from orchestrator.report.cost import costs
from orchestrator.report.heat import heat_cells
from orchestrator.report.overview import model_tables
from orchestrator.report.sections import cost_section
from orchestrator.report.tables import Row, long_table, nominal_bits
from orchestrator.results import SkippedCell, StageResult, SweepResult, TaskInfo, VariantResult
from tests.orchestrator import synthetic

VOID = {"meta", "br", "link", "img", "input", "hr"}
SKIP = SkippedCell(
    {"model": "stories260k", "method": "rtn", "scheme": "w4a16_g64", "calibration": "c", "replicate": "r0", "task": "self_perplexity"},
    "group size 64 does not divide 172 inputs of mlp.down_proj",
)
MIXED = {"fail": [("gptq", "w2a16_g64")], "wait": [("awq", "w3a16_g64")], "reused": [("rtn", "w8a16_g64")], "skipped": [SKIP]}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.cells: list[dict[str, str]] = []
        self.rows: list[list[tuple[str, dict[str, str]]]] = []
        self.figures: dict[str, dict[str, object]] = {}
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self._figure: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        self.attributes += [(tag, k, v) for k, v in given.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", given))
        self._figure = given.get("data-plot") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._figure = None

    def handle_data(self, data: str) -> None:
        if self._figure:
            self.figures[self._figure] = json.loads(data)
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)
            if "td" in self.open or "th" in self.open:
                text, given = self.rows[-1][-1]
                self.rows[-1][-1] = (text + data, given)


def page_of(result: SweepResult, folder: Path) -> Page:
    return Page(without_plotly(write_report(result, folder).html.read_text(encoding="utf-8")))


def without_plotly(html: str) -> str:
    assert html.count(get_plotlyjs()) == 1
    return html.replace(get_plotlyjs(), "")


def test_every_variant_and_task_appears_and_what_failed_is_shown(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, models=("wikitext_llama", "opt"), **MIXED)
    page = page_of(result, tmp_path / "report")
    text = " ".join(page.text)
    for variant in result.variants:
        assert variant.label in text
    for task in result.tasks:
        assert task in text
    line = next(r for r in page.rows if r and r[0][0] == "gptq · w2a16_g64")
    assert [t for t, _ in line[1:3]] == ["FAILED", "FAILED"]
    assert "not positive definite" in line[1][1]["title"]
    assert "Skipped: group size 64 does not divide 172" in text
    assert "(2 stages; 4 stages behind them did not run)" in text  # one per model, each blocks two tasks
    rows = long_table(result)
    states = {(r.variant_key, r.task): r.status for r in rows if r.is_primary}
    for v in result.variants:
        for task, stage in v.evaluations.items():
            assert states[v.key, task] == stage.status.value
    assert sum(r.status == "SKIPPED" for r in rows) == 1


def test_csv_parquet_and_page_hold_the_same_numbers(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, **MIXED)
    files = write_report(result, tmp_path / "report")
    rows = long_table(result)
    stored = pq.read_table(files.parquet).to_pylist()
    read = list(csv.DictReader(io.StringIO(files.csv.read_text(encoding="utf-8"))))
    assert len(stored) == len(read) == len(rows)
    for a, b in zip(stored, read, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, float):
                assert float(b[name]) == value
            else:
                assert b[name] == ("" if value is None else str(value))
    page = Page(files.html.read_text(encoding="utf-8"))
    shown = [given for line in page.rows for _, given in line if "data-delta" in given and "data-value" in given]
    expected = [r for r in rows if r.delta is not None]
    assert len(shown) == len(expected) > 30
    for name in ("value", "delta", "low", "high", "p_holm"):
        assert sorted(float(g[f"data-{name.replace('_', '-')}"]) for g in shown) == sorted(getattr(r, name) for r in expected)


def test_deltas_of_the_table_are_the_differences_of_its_scores(tmp_path: Path) -> None:
    rows = [r for r in long_table(synthetic.sweep(tmp_path)) if r.delta is not None]
    assert rows
    for r in rows:
        assert r.value == pytest.approx(r.baseline_value + r.delta, rel=1e-9)
        assert r.low <= r.delta <= r.high
        assert r.p_holm >= r.p_value
        assert r.reason == ""


def test_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    html = write_report(synthetic.sweep(tmp_path, **MIXED), tmp_path / "report").html.read_text(encoding="utf-8")
    rest = without_plotly(html)
    assert not re.search(r"(https?:)?//[\w.-]+\.\w", rest)
    assert "default-src 'none'" in rest
    assert not [a for a in Page(html).attributes if a[1] in ("src", "srcset") or (a[1] == "href" and not a[2].startswith("#"))]


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, **MIXED)
    first, second = (write_report(result, tmp_path / name) for name in ("a", "b"))
    for kind in ("html", "csv", "parquet"):
        assert getattr(first, kind).read_bytes() == getattr(second, kind).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["report.html", "table.csv", "table.parquet"]


def test_names_and_messages_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script>&<b>'
    result = synthetic.sweep(tmp_path, models=(evil,), name=evil, fail=[("rtn", "w2a16_g64")], skipped=[SkippedCell(SKIP.axes, evil)])
    result = replace(result, variants=tuple(replace(v, flags=(evil,)) for v in result.variants), config={"x": evil})
    files = write_report(result, tmp_path / "report")
    rest = without_plotly(files.html.read_text(encoding="utf-8"))
    assert "<script>alert" not in rest
    assert evil in " ".join(Page(rest).text)


def test_figures_are_valid_plotly_and_never_mix_models(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, models=("wikitext_llama", "opt"), **MIXED)
    page = page_of(result, tmp_path / "report")
    # Per model: two figures per task, and the two kinds of layer error.
    assert len(page.figures) == 2 * (2 * 2 + 2)
    for spec in page.figures.values():
        go.Figure(spec)  # validates every property
    for i, model in enumerate(model_tables(result, long_table(result))):
        bits = page.figures[f"bits-{100 * i}"]
        points = [y for trace in bits["data"] if "markers" in trace["mode"] for y in trace["y"]]
        scores = [x.cells["self_perplexity"].value for x in model.quantized]
        assert sorted(points) == sorted(s for s in scores if s is not None)


def test_lines_stay_within_method_calibration_and_runtime_parts(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w4a16_g64", "w3a16_g64"), replicates=("r0", "r1"))
    changed = []
    for v in result.variants:
        if v.axes["scheme"] == "w3a16_g64":
            spec = {"model": {}, "activation": {"bits": 8}}
            stages = {k: replace(e, spec=spec) for k, e in v.evaluations.items()}
            v = replace(v, evaluations=stages)
        changed.append(v)
    page = page_of(replace(result, variants=tuple(changed)), tmp_path / "report")
    drawn = {t["name"]: len(t["y"]) for t in page.figures["bits-0"]["data"] if "markers" in t["mode"]}
    assert drawn == {"rtn · g64": 2, "rtn · g64 a8": 2}  # two replicates each
    through = [t for t in page.figures["bits-0"]["data"] if t["mode"] == "lines"]
    assert [len(t["y"]) for t in through] == [1, 1]  # the mean of the replicates


@given(st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=25))
def test_pareto_front_matches_brute_force(points: list[tuple[float, float]]) -> None:
    def dominated(p: tuple[float, float]) -> bool:
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

    assert pareto_front(points) == [not dominated(p) for p in points]


def test_dominated_variants_are_close_only_when_the_paired_interval_says_so(tmp_path: Path) -> None:
    # Two methods of equal error differ by item noise alone; RTN at full error is worse beyond chance.
    synthetic.METHODS["twin"] = synthetic.METHODS["gptq"]
    try:
        result = synthetic.sweep(tmp_path, methods=("rtn", "gptq", "twin"), schemes=("w4a16_g64",), tasks=(synthetic.PERPLEXITY,))
    finally:
        del synthetic.METHODS["twin"]
    (model,) = model_tables(result, long_table(result))
    found = {c.lines[0].method: s for c, s in standings(model, synthetic.PERPLEXITY)}
    assert found["rtn"] is Standing.DOMINATED
    assert {found["gptq"], found["twin"]} == {Standing.FRONT, Standing.CLOSE}
    pick = best_per_width(model)[4.0]["self_perplexity"]
    assert pick.best.lines[0].method in ("gptq", "twin")
    assert len(pick.tied) == 1


def test_heat_map_shows_the_differences_of_the_table_widest_scheme_first(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, schemes=("w2a16_g64", "w8a16_g64", "w3a16_g64"), **MIXED)
    rows = long_table(result)
    (model,) = model_tables(result, rows)
    for task in model.tasks:
        methods, schemes, cells = heat_cells(model, task)
        assert methods == ["rtn", "gptq", "awq"]
        assert schemes == ["w8a16_g64", "w3a16_g64", "w2a16_g64"]
        for r in rows:
            if r.is_primary and r.task == task.name and r.status == "SUCCEEDED" and not r.is_baseline:
                assert cells[r.method, r.scheme].delta == r.delta
    page = page_of(result, tmp_path / "report")
    headless = [r for r in page.rows if r and r[0][0] in ("rtn", "gptq", "awq") and len(r) == 4]
    shown = [float(g["data-delta"]) for line in headless for _, g in line if "data-delta" in g]
    assert sorted(shown) == sorted(r.delta for r in rows if r.is_primary and r.delta is not None)


def with_cache(result: SweepResult, scheme: str, bits: dict[str, float]) -> SweepResult:
    """Variants of the scheme as if they had quantized keys and values: `bits` stored by task."""

    def cached(stage: StageResult, stored: float) -> StageResult:
        summary = {**stage.summary, "kv": {"kind": "kivi", "mode": "simulate", "tokens": 512, "bits_stored": stored}}
        return replace(stage, record={**(stage.record or {}), "summary": summary})

    changed = []
    for v in result.variants:
        if v.axes["scheme"] == scheme:
            v = replace(v, evaluations={t: cached(e, bits[t]) for t, e in v.evaluations.items()})
        changed.append(v)
    return replace(result, variants=tuple(changed))


def test_stored_bits_of_the_cache_stand_beside_those_of_the_weights(tmp_path: Path) -> None:
    plain = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w4a16_g64", "w3a16_g64"))
    bits = {"self_perplexity": 2.5, "self_divergence": 2.25}
    result = with_cache(plain, "w3a16_g64", bits)
    files = write_report(result, tmp_path / "report")
    told = {(r["scheme"], r["task"]): r["kv_bits_stored"] for r in pq.read_table(files.parquet).to_pylist()}
    assert told == {(s, t): bits[t] if s == "w3a16_g64" else None for s in ("none", "w4a16_g64", "w3a16_g64") for t in bits}
    page = Page(without_plotly(files.html.read_text(encoding="utf-8")))
    (table,) = ([[t for t, _ in r] for r in page.rows[i : i + 4]] for i, r in enumerate(page.rows) if r and r[-1][0] == "stored KV bits")
    assert [line[-1] for line in table] == ["stored KV bits", "–", "–", "2.25 to 2.50"]
    out = io.StringIO()
    print_table(result, Console(file=out, width=100))
    assert "KV bits" in out.getvalue()
    assert "2.25 to 2.50" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100
    without = page_of(plain, tmp_path / "plain")
    assert "stored KV bits" not in " ".join(without.text)


def test_bits_that_a_stage_will_choose_are_not_told_before(tmp_path: Path) -> None:
    waiting = [("rtn", "w4a16_g64")]
    _, variant = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w4a16_g64",), wait=waiting).variants
    assert nominal_bits(variant) == 4
    quantize = replace(variant.quantize, spec={**variant.quantize.spec, "auto": {"budget": 3.2, "candidates": []}})
    assert nominal_bits(replace(variant, quantize=quantize)) is None


def test_cost_counts_each_stage_once_and_each_cell_alone(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, methods=("rtn", "gptq"), schemes=("w4a16_g64",), reused=[("rtn", "w4a16_g64")])
    c = costs(result)
    by_kind = {k.kind: k for k in c.kinds}
    # By hand: calibrate 8 s, two quantize of 3 s (one reused), three variants x two tasks of 2 s.
    assert (by_kind["quantize"].run, by_kind["quantize"].reused) == (1, 1)
    assert by_kind["quantize"].reused_seconds == pytest.approx(3)
    assert c.run_seconds == pytest.approx(8 + 3 + 12)
    # Alone: baseline 2 x 2; rtn 2 x (3 + 2); gptq 2 x (8 + 3 + 2).
    assert c.alone_seconds == pytest.approx(4 + 10 + 26)
    assert c.shared_seconds == pytest.approx(8 + 6 + 12)
    assert sum(k.bytes for k in c.kinds) == sum(p.stat().st_size for p in tmp_path.glob("objects/*/*/*/payload/*"))
    said = str(cost_section(result))
    assert "took 23 s of worker time; reused ones took 3.0 s in earlier sweeps. Those that scores need took 26 s, each once;" in said
    assert "would have taken 40 s: sharing stages saved 14 s." in said


def overflowing(result: SweepResult, root: Path) -> SweepResult:
    """The last variant's perplexity overflows to infinity, and its divergence is NaN."""
    last = result.variants[-1]
    stages = {}
    for name, bad in (("self_perplexity", 1e6), ("self_divergence", math.nan)):
        make = synthetic.perplexity_items if name == "self_perplexity" else synthetic.divergence_items
        items = {k: (np.full(60, bad) if k in ("nll", "kl") else v) for k, v in make(0, 0.1).items()}
        stages[name] = synthetic.evaluate_stage(root, f"bad {name}", result.tasks[name], items)
    return replace(result, variants=(*result.variants[:-1], replace(last, evaluations=stages)))


def odd_sweeps(root: Path) -> Iterator[tuple[str, SweepResult]]:
    one = synthetic.sweep(root / "one", methods=("rtn",), schemes=("w4a16_g64",))
    yield "one variant", one
    yield "empty", replace(one, variants=(), stages={}, tasks={}, skipped=(SKIP,))
    yield "baseline only", synthetic.sweep(root / "base", methods=())
    yield "all failed", synthetic.sweep(root / "failed", methods=("rtn",), fail=[("rtn", s) for s in synthetic.SCHEMES])
    yield "nothing ran", pending_everywhere(synthetic.sweep(root / "pending"))
    yield "not finite", overflowing(synthetic.sweep(root / "inf"), root / "inf")
    yield "no baseline", replace(one, variants=one.variants[1:])
    yield "single item", synthetic.sweep(root / "single", n_items=1)


def pending_everywhere(result: SweepResult) -> SweepResult:
    def wait(v: VariantResult) -> VariantResult:
        stages = {k: synthetic.pending(e) for k, e in v.evaluations.items()}
        return replace(v, quantize=synthetic.pending(v.quantize) if v.quantize else None, evaluations=stages)

    stages = {k: synthetic.pending(s) for k, s in result.stages.items()}
    return replace(result, variants=tuple(map(wait, result.variants)), stages=stages)


def test_odd_sweeps_are_reported_without_loss(tmp_path: Path) -> None:
    for name, result in odd_sweeps(tmp_path):
        page = page_of(result, tmp_path / "report" / name)
        text = " ".join(page.text)
        for v in result.variants:
            assert v.label in text, name
        for spec in page.figures.values():
            go.Figure(spec)
        printed = io.StringIO()
        print_table(result, Console(file=printed, width=120))
        out = printed.getvalue()
        assert re.search(rf"^{sum(len(v.evaluations) for v in result.variants)} scores?\b", out, re.MULTILINE), name
        if name == "not finite":
            assert "∞" in out
            assert "NaN" in out
            assert "Not drawn: 1 without a finite score" in text


def test_a_corrupt_item_table_costs_the_interval_not_the_report(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w4a16_g64",))
    stage = result.variants[1].evaluations["self_perplexity"]
    (stage.payload / "items.parquet").write_bytes(b"damaged")
    row = next(r for r in long_table(result) if r.evaluate_key == stage.key and r.is_primary)
    assert row.value is not None
    assert row.delta is None
    assert "differs from its recorded digest" in row.reason
    assert row.reason.split(":")[0] == "no difference"


@pytest.mark.parametrize("width", [64, 100, 140])
def test_terminal_table_fits_and_names_every_variant_and_task(tmp_path: Path, width: int) -> None:
    tasks = (*(replace_name(synthetic.PERPLEXITY, n) for n in ("wikitext2", "c4", "tinystories")), synthetic.DIVERGENCE)
    result = synthetic.sweep(tmp_path, tasks=tasks, **MIXED)
    out = io.StringIO()
    print_table(result, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for v in result.variants[1:]:
        assert " · ".join(v.label.split(" · ")[1:]) in text
    assert all(t.name in text for t in tasks)
    assert text.count("FAILED") == len(tasks) + 1
    assert "skipped 1: group size 64 does not divide" in text
    assert "\x1b" not in text
    body = [line for line in lines if line.startswith(("unquantized", "rtn", "gptq", "awq"))]
    assert body[0].startswith("unquantized")


def replace_name(task: TaskInfo, name: str) -> TaskInfo:
    return replace(task, name=name)


def test_terminal_shows_score_difference_and_interval(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w2a16_g64",), tasks=(synthetic.PERPLEXITY,))
    out = io.StringIO()
    print_table(result, Console(file=out, width=100))
    row: Row = next(r for r in long_table(result) if r.is_primary and not r.is_baseline)
    assert f"{row.value:.1f}  +{row.delta:.1f} [{row.low:.1f}, {row.high:.1f}]*" in out.getvalue()
    assert "2.50  2.50 MB" in out.getvalue()
