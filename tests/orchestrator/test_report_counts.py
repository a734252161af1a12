"""The report counts what it names: scores, cells that were skipped, variants that did not fail. Its table in the terminal is whole."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.report import print_table
from orchestrator.report.tables import long_table
from orchestrator.report.terminal import cell_lines
from tests.orchestrator import synthetic
from tests.orchestrator.test_report import MIXED, page_of


def test_scores_are_counted_apart_from_cells(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, **MIXED)
    out = io.StringIO()
    print_table(result, Console(file=out, width=100))
    # (3 methods x 4 schemes + the unquantized model) x 2 tasks; of the grid's cells one has no score.
    assert "26 scores: 22 done, 2 failed, 2 not run; 1 cell skipped." in out.getvalue()
    text = "".join(page_of(result, tmp_path / "report").text)
    assert "22scores finished2failed2not run1cell skipped" in text
    assert "cells" not in text


def test_variants_with_unquantized_weights_did_not_fail(tmp_path: Path) -> None:
    given = {"methods": ("rtn", "gptq"), "schemes": ("w4a16_g64", "w3a16_g64"), "tasks": (synthetic.PERPLEXITY,)}
    result = synthetic.sweep(tmp_path, **given, fail=[("gptq", "w4a16_g64")])
    variants = (replace(v, quantize=None) if v.axes["scheme"] == "w3a16_g64" else v for v in result.variants)
    page = page_of(replace(result, variants=tuple(variants)), tmp_path / "report")
    assert "Not drawn: 1 without a finite score (failed, not run, or overflowed), 2 without quantized weights." in " ".join(page.text)


@pytest.mark.parametrize("width", [20, 64, 80, 120])
def test_terminal_wraps_names_that_leave_no_room_and_loses_no_number(tmp_path: Path, width: int) -> None:
    method, scheme = "omniquant[rounding.params.epochs=1,rounding.params.let=true]", "w4a16_g64[overrides={*.down_proj:{bits:8}}]"
    result = synthetic.sweep(tmp_path, methods=(method,), schemes=(scheme,))
    out = io.StringIO()
    print_table(result, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= max(width, 64)
    text = "\n".join(lines)
    for row in filter(lambda r: r.is_primary, long_table(result)):
        assert all(part in text for part in cell_lines(row, row.is_baseline))
    assert text.count("MB") == 2 * len(result.variants)
    # Numbers stand right of two spaces, or alone.
    name = "".join(line.split("  ")[0] for line in lines if not line.startswith(" "))
    assert f"{method}·{scheme}".replace(" ", "") in name.replace(" ", "")
