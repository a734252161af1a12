"""The files of a report are written anew when they are not all there, tell another state, or come from older code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import report
from orchestrator.results import SkippedCell, SweepResult
from orchestrator.run import refresh_report
from orchestrator.store import Store
from tests.orchestrator import synthetic

FILES = ["report.html", "table.csv", "table.parquet"]
OLD = "as it was before"


def test_files_that_tell_the_very_state_are_left_alone_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store").open()
    skipped = SkippedCell({"model": "m", "task": "self_perplexity"}, "group size 64 does not divide 172 inputs")
    result = replace(synthetic.sweep(tmp_path / "made", methods=(), tasks=(), skipped=[skipped]), variants=())
    page = refresh_report(store, result)
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.digest", *FILES]
    assert skipped.reason in page.read_text(encoding="utf-8")

    def written(told: SweepResult = result) -> bool:
        """Whether asking for the report writes it."""
        page.write_text(OLD)
        assert refresh_report(store, told) == page
        return page.read_text(encoding="utf-8") != OLD

    assert not written()
    for name in FILES[1:]:
        (page.parent / name).unlink()
        assert written()
        assert (page.parent / name).is_file()
    assert not written()
    other = replace(result, skipped=(replace(skipped, reason="another reason"),))
    assert written(other)
    assert not written(other)
    assert written(replace(result, model_names={k: "renamed" for k in result.model_names}))
    assert written()
    monkeypatch.setattr(report, "SCHEMA", report.SCHEMA + 1)
    assert written()
