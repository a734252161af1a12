"""The report says what its intervals resample."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.report import print_table, write_report
from orchestrator.report.choices import Standing, best_per_width, standings
from orchestrator.report.overview import model_tables
from orchestrator.report.tables import long_table
from tests.orchestrator import synthetic


@pytest.mark.parametrize(
    ("documents", "said", "unit"),
    [
        (None, "self_perplexity: 60 items, which do not tell their documents", "item"),
        (1, "self_perplexity: 60 items, since their 1 document is fewer than 8", "item"),
        (12, "self_perplexity: 12 documents of 60 items", "document"),
    ],
)
def test_report_says_what_was_resampled(documents: int | None, said: str, unit: str, tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w2a16_g64",), tasks=(synthetic.PERPLEXITY,), documents=documents)
    out = io.StringIO()
    print_table(result, Console(file=out, width=400))
    assert said in out.getvalue()
    if unit == "document":
        assert said in write_report(result, tmp_path / "report").html.read_text(encoding="utf-8")
    row = next(r for r in long_table(result) if r.is_primary and not r.is_baseline)
    assert (row.interval_unit, row.n_documents) == (unit, documents)


def test_a_single_item_tells_no_variant_from_another(tmp_path: Path) -> None:
    """It has no interval, so that nothing is beaten and the best has all others beside it."""
    result = synthetic.sweep(tmp_path, schemes=("w4a16_g64",), tasks=(synthetic.PERPLEXITY,), n_items=1)
    (model,) = model_tables(result, long_table(result))
    pick = best_per_width(model)[4.0]["self_perplexity"]
    assert {pick.best.name, *pick.tied} == {x.name for x in model.quantized}
    assert Standing.DOMINATED not in {s for _, s in standings(model, synthetic.PERPLEXITY)}
    out = io.StringIO()
    print_table(result, Console(file=out, width=400))
    assert "self_perplexity: 1 item, which gives no interval" in out.getvalue()


def test_a_score_whose_larger_values_are_better_gives_the_choices_of_its_complement(tmp_path: Path) -> None:
    found = []
    for primary in ("flips", "top1_agreement"):  # 1 - agreement, and agreement
        task = replace(synthetic.DIVERGENCE, primary=primary)
        result = synthetic.sweep(tmp_path / primary, tasks=(task,))
        rows = long_table(result)
        (model,) = model_tables(result, rows)
        picks = {width: (of[task.name].best.name, of[task.name].tied) for width, of in best_per_width(model).items()}
        found.append((picks, [(c.name, s) for c, s in standings(model, task)]))
        losses = [r.loss for r in rows if r.is_primary and not r.is_baseline]
        assert all(x is not None and x > 0 for x in losses)
    assert found[0] == found[1]
    # Each is the best of its own width alone.
    assert {width: best for width, (best, _) in found[0][0].items()} == {float(b): f"gptq · {s}" for s, b in synthetic.SCHEMES.items()}
    assert {s for _, s in found[0][1]} >= {Standing.FRONT, Standing.DOMINATED}


def test_items_that_cannot_be_read_tell_no_variant_from_another(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, schemes=("w2a16_g64",), tasks=(synthetic.PERPLEXITY,))
    (rtn,) = (v.evaluations["self_perplexity"] for v in result.variants if v.axes["method"] == "rtn")
    assert rtn.payload is not None
    (rtn.payload / "items.parquet").write_bytes(b"damaged")
    (model,) = model_tables(result, long_table(result))
    assert best_per_width(model)[2.0]["self_perplexity"].tied == ("rtn · w2a16_g64",)
    assert {c.name: s for c, s in standings(model, synthetic.PERPLEXITY)}["rtn · w2a16_g64"] is Standing.CLOSE


def test_what_was_resampled_names_the_models_where_it_differs(tmp_path: Path) -> None:
    """Each model's tokenizer cuts the text into windows of its own."""
    one, other = (
        synthetic.sweep(tmp_path / m, models=(m,), methods=("rtn",), schemes=("w2a16_g64",), tasks=(synthetic.PERPLEXITY,), n_items=n)
        for m, n in (("a", 60), ("b", 40))
    )
    both = replace(one, variants=(*one.variants, *other.variants), stages={**one.stages, **other.stages})
    for result, said in (
        (both, "resampled: a, self_perplexity: 60 items, which do not tell their documents; b, "),
        (one, "resampled: self"),
    ):
        out = io.StringIO()
        print_table(result, Console(file=out, width=400))
        assert said in out.getvalue()


def test_names_of_swept_tasks_and_models_stay_whole(tmp_path: Path) -> None:
    """Brackets are markup to rich."""
    tasks = tuple(replace(synthetic.PERPLEXITY, name=f"self_perplexity[params.limit={n}]") for n in (4, 8))
    results = [
        synthetic.sweep(tmp_path / m, models=(m,), methods=("rtn",), tasks=tasks, n_items=n) for m, n in (("m[path=/a]", 9), ("b", 8))
    ]
    both = replace(results[0], variants=(*results[0].variants, *results[1].variants))
    out = io.StringIO()
    print_table(both, Console(file=out, width=600))
    said = (
        "m[path=/a], self_perplexity[params.limit=4]: 9 items, which do not tell their documents; self_perplexity[params.limit=8]: 9 items"
    )
    assert said in out.getvalue()
