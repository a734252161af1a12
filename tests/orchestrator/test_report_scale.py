"""Work and memory of a report grow as its table does."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from rich.console import Console

from orchestrator import intervals, report
from orchestrator.report import print_table, write_report
from orchestrator.stats import paired_delta
from tests.orchestrator import synthetic

DRIVER = str(Path(intervals.__file__).parent)


def called(folder: Path, methods: int, schemes: int) -> Counter[str]:
    """How often each function of the driver is called for the page and the table of so many methods and schemes, one in four failed."""
    names, widths = [f"m{i}" for i in range(methods)], [f"s{i}" for i in range(schemes)]
    cells = [(m, s) for m in names for s in widths]
    result = synthetic.sweep(folder, methods=names, schemes=widths, fail=cells[::4])
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(DRIVER):
            calls[f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno} {frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        write_report(result, folder / "report")
        print_table(result, Console(file=io.StringIO(), width=300))
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("schemes", [False, True])
def test_twice_the_variants_are_twice_the_work(schemes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(16):
        monkeypatch.setitem(synthetic.METHODS, f"m{i}", 1 + i / 16)
        monkeypatch.setitem(synthetic.SCHEMES, f"s{i}", 2 + i / 4)
    few, many = (called(tmp_path / str(n), *((3, n) if schemes else (n, 3))) for n in (8, 16))
    # Beside what grows with the table: once for each file, model and task. Four times is the square.
    assert {name: (few[name], n) for name, n in many.items() if n > 3 * few[name] + 100} == {}


def test_draws_of_many_tasks_are_made_once_and_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_drawn", {})
    sizes = range(100, 140)  # as many tasks, each of another number of documents
    first = [intervals._draws(n, 0, 50) for n in sizes]
    assert all(intervals._draws(n, 0, 50) is made for n, made in zip(sizes, first, strict=True))
    monkeypatch.setattr(intervals, "KEPT_DRAWS", 20_000)
    for n in (400, 401, 200, 30, 160):
        last = intervals._draws(n, 0, 50)
        assert last.shape == (50, n)
        assert sum(a.nbytes for a in intervals._drawn.values()) <= max(20_000, last.nbytes)
    assert [n for n, _, _ in intervals._drawn] == [200, 30, 160]


def test_what_a_report_compared_is_known_to_who_asks_next(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w4a16_g64",), n_items=8)  # few, which are not resampled
    task = synthetic.PERPLEXITY
    base, variant = (next(v for v in result.variants if v.is_baseline is wanted).evaluations[task.name] for wanted in (True, False))
    first = [paired_delta(variant, base, task, "ppl", seed=seed) for seed in range(6000)]
    assert all(paired_delta(variant, base, task, "ppl", seed=seed) is made for seed, made in enumerate(first))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_a_legend_of_many_names_scrolls_below_its_axes() -> None:
    page = (Path(report.__file__).parent / "page.js").read_text()
    parts = [re.search(pattern, page, re.DOTALL) for pattern in (r"const PLOT[^\n]*", r"function fitted.*?\n}")]
    program = (
        "\n".join(p[0] for p in parts if p is not None)
        + """
        const margin = { l: 64, r: 16, t: 28 };
        const fit = (n) => fitted({ clientWidth: 500, style: {} }, { data: Array(n).fill({ name: "gptq".repeat(9) }), layout: { margin } });
        console.log(JSON.stringify([1, 5, 19, 20, 2000].map((n) => [fit(n).height, fit(n).height + fit(n).legend.y * PLOT - PLOT - 28])));
    """
    )
    ran = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    (one, _), (five, _), most, *more = json.loads(ran.stdout)
    assert one < five < most[0] < 900
    assert more == [most, most]
    height, room = most
    assert height / 2 <= room  # Plotly's bound for a legend below the axes: all that it scrolls is on the figure
