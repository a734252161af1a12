"""The files of a report are written anew when they are not all there, tell another state, or come from older code; whole, or not at all."""

from __future__ import annotations

import csv
import errno
import io
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from orchestrator import report, run, verbs
from orchestrator.errors import StoreError
from orchestrator.report import html
from orchestrator.report.tables import long_table, write_csv
from orchestrator.results import SkippedCell, SweepResult
from orchestrator.run import refresh_report
from orchestrator.store import Store
from tests.orchestrator import synthetic
from tests.orchestrator.sweeping import sweep

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


def test_a_reason_of_any_bytes_keeps_its_row_and_its_report(tmp_path: Path) -> None:
    """A progress bar ends lines with carriage returns; Linux takes file names that are no UTF-8, as Python's surrogates."""
    skipped = SkippedCell({"model": "m", "task": "self_perplexity"}, "10 %\r20 %\r\ncaf\udce9.txt")
    result = replace(synthetic.sweep(tmp_path, methods=("rtn",), skipped=[skipped]), config={"data_dir": "caf\udce9"})
    files = report.write_report(result, tmp_path / "report")
    with files.csv.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    told = pq.read_table(files.parquet).to_pylist()
    assert [r["status"] for r in rows] == [r["status"] for r in told]
    assert rows[-1]["reason"] == told[-1]["reason"] == "10 %\n20 %\ncaf\\udce9.txt"
    assert "caf\\udce9.txt" in files.html.read_text(encoding="utf-8")


def test_two_writers_do_not_meet_and_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    page = tmp_path / "report.html"

    def while_another_writes(part: Path) -> None:
        part.write_text("mine")
        html._replace(page, lambda other: other.write_text("theirs"))
        assert page.read_text() == "theirs"

    html._replace(page, while_another_writes)
    assert page.read_text() == "mine"

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        html._replace(page, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert page.read_text() == "mine"


def test_a_full_disk_is_not_told_as_a_report_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(store: Store, result: SweepResult) -> Path:
        raise OSError(error, "as told")

    monkeypatch.setattr(run, "refresh_report", write)
    store, result, said = Store(tmp_path), synthetic.sweep(tmp_path, methods=(), tasks=()), io.StringIO()
    error = errno.EACCES
    assert run.try_report(store, result, Console(file=said)) is None
    assert "as told" in said.getvalue()
    error = errno.ENOSPC
    with pytest.raises(OSError, match="as told"):
        run.try_report(store, result, Console(file=said))


def test_a_store_for_reading_shows_the_report_that_tells_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = sweep(tmp_path / "store", "method=rtn").report
    assert page is not None

    def read_only(store: Store, result: SweepResult) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(verbs, "renew_report", read_only)
    said = io.StringIO()
    assert verbs.report(tmp_path / "store", None, Console(file=said, width=200)) == 0
    assert f"report: {page}" in said.getvalue()
    (page.parent / run.REPORT_MARKER).write_text("of another state")
    with pytest.raises(StoreError, match="what is there is of an earlier time"):
        verbs.report(tmp_path / "store", None, Console(file=said, width=200))


def test_the_table_tells_what_stages_recorded(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, schemes=("w4a16_g64", "w2a16_g64"), wait={("awq", "w2a16_g64")})
    write_csv(long_table(result), tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as f:
        rows = {(r["variant_key"], r["task"], r["metric"]): r for r in csv.DictReader(f)}

    def number(text: str) -> float | None:
        return float(text) if text else None

    for variant in result.variants:
        quantize = variant.quantize
        for task, evaluation in variant.evaluations.items():
            row = rows[variant.key, task, result.tasks[task].primary]
            assert number(row["value"]) == evaluation.summary.get("scores", {}).get(row["metric"])
            assert number(row["evaluate_seconds"]) == evaluation.seconds
            found = {n: number(row[n]) for n in ("bits_stored", "model_bytes", "weight_error", "peak_memory_bytes")}
            facts = {"model_bytes": next(iter(result.model_bytes.values()))} if quantize is None else quantize.summary
            assert found == {n: facts.get(n) for n in found}
            assert number(row["quantize_seconds"]) == (None if quantize is None else quantize.seconds)
            assert (row["status"], row["reason"]) == (evaluation.status.value, "" if evaluation.record else "pending")
