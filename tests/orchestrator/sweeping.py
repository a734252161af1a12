"""Small real sweeps for tests: the shipped model, a few windows of the shipped text, everything in one process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from orchestrator.command import Command
from orchestrator.run import SweepRun, run_grid

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "scheme=w4a16_g64",
    "task=self_perplexity",
    "task.params.limit=2",
    "calibration=self_text",
    "calibration.samples=2",
    "calibration.sequence_length=64",
    "cluster=in_process",
    "tracking=none",
)


def overrides(store: Path, *more: str) -> list[str]:
    """`more` wins over the small settings."""
    given = {m.split("=", 1)[0] for m in more}
    return [f"store={store}", *(s for s in SMALL if s.split("=", 1)[0] not in given), *more]


def sweep(store: Path, *more: str) -> SweepRun:
    return told(store, *more)[0]


def told(store: Path, *more: str) -> tuple[SweepRun, str]:
    """A sweep, and what it said."""
    command, said = Command(tuple(overrides(store, *more)), multirun=True), io.StringIO()
    return run_grid(command.compose(), command, Console(file=said, width=200)), said.getvalue()


def command(store: Path, *more: str, program: str) -> subprocess.Popen[str]:
    """`bitgrid run -m` in a process of its own, by a program that takes the command line."""
    arguments = [sys.executable, "-c", program, "run", "-m", *overrides(store, *more)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, cwd=store.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def bitgrid(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Any verb, to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments], cwd=folder, env=environment, text=True, capture_output=True, timeout=240
    )


def scores(run: SweepRun) -> dict[tuple[str, str, str], float]:
    """(variant, task, metric) ▸ value."""
    return {
        (v.label, task, metric): value
        for v in run.result.variants
        for task, stage in v.evaluations.items()
        for metric, value in stage.summary.get("scores", {}).items()
    }


def committed(store: Path) -> dict[str, float]:
    """Key ▸ when its record was written, of every artifact in the store."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (store / "objects").glob("*/*/*/record.json")}
