"""The report says what its intervals resample."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.report import print_table, write_report
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
