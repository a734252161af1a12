"""What the demo costs: planning it, running it, running it again; each beside its goal.

    python bench/demo.py [--out FILE] [OVERRIDES]

In an empty folder, every command in a process of its own, as a user has it: wall time with start-up. OVERRIDES (Hydra's) make the grid
smaller, to try this program out; goals are those of the whole demo on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PLANS = 3
"""Planned so many times; the median counts."""
PROBE = """
import json, sys, time

from orchestrator import run
from orchestrator.cli import main
from orchestrator.command import Command

spent = {"planning_s": 0.0}

def timed(function):
    def call(*arguments, **named):
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent["planning_s"] += time.perf_counter() - start
    return call

Command.compose = timed(Command.compose)
run.build_plan, run.missing_stages = timed(run.build_plan), timed(run.missing_stages)
code = main(sys.argv[2:])
heavy = [m for m in ("torch", "ray") if m in sys.modules]
with open(sys.argv[1], "w") as file:
    json.dump({**spent, "imported": heavy}, file)
sys.exit(code)
"""
"""`bitgrid` that leaves behind what it imported, and the seconds of composing, planning and looking for what is there."""


@dataclass(frozen=True)
class Call:
    """One command."""

    seconds: float
    """Wall time, with start-up."""
    planning_s: float
    imported: Sequence[str]
    """Of torch and ray, in the driver."""
    mlflow_runs: int
    """In the folder's database, afterwards."""


@dataclass(frozen=True)
class Goal:
    what: str
    got: str
    goal: str
    met: bool

    def line(self) -> str:
        return f"{self.what:<28} {self.got:<38} goal: {self.goal}: {'met' if self.met else 'MISSED'}"


def goals(plan: Call, first: Call, second: Call) -> list[Goal]:
    def within(what: str, seconds: float, limit: float, rest: str = "", allowed: str = "", holds: bool = True) -> Goal:
        return Goal(what, f"{seconds:.2f} s{rest}", f"{limit:g} s{allowed}", seconds <= limit and holds)

    added = second.mlflow_runs - first.mlflow_runs
    imported = ", torch imported" if "torch" in plan.imported else ", torch not imported"
    started = ", ray imported" if "ray" in second.imported else ", Ray not started"
    return [
        within("bitgrid plan", plan.seconds, 2, imported, ", torch never imported", "torch" not in plan.imported),
        within("first run", first.seconds, 240, f", {first.mlflow_runs} MLflow runs"),
        within("second run", second.seconds, 20, f", {added} MLflow runs added", ", none added", added == 0),
        within("its planning, cache checks", second.planning_s, 1, started, ", no Ray started", "ray" not in second.imported),
    ]


def call(folder: Path, *arguments: str) -> Call:
    """`bitgrid ARGUMENTS` in the folder. Raises CalledProcessError where it fails."""
    told = folder / "told.json"
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    command = [sys.executable, "-c", PROBE, str(told), *arguments]
    subprocess.run(command, cwd=folder, env={**os.environ, **quiet}, stdout=sys.stderr, check=True)
    seconds = time.perf_counter() - start
    return Call(seconds, **json.loads(told.read_text()), mlflow_runs=runs_in(folder / "mlflow.db"))


def runs_in(database: Path) -> int:
    if not database.is_file():
        return 0
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("select count(*) from runs").fetchone()[0])


def about() -> Mapping[str, object]:
    memory = round(psutil.virtual_memory().total / 2**30)
    packages = ("torch", "ray", "mlflow", "hydra-core")
    return {
        "machine": f"{os.cpu_count()} cores {platform.machine()}, {memory} GiB",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("overrides", nargs="*", help="of a smaller demo")
    given = parser.parse_args()
    grid = ["-m", "sweep=demo", *given.overrides]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = sorted((call(folder, "plan", *grid) for _ in range(PLANS)), key=lambda c: c.seconds)[PLANS // 2]
        first = call(folder, "run", *grid)
        second = call(folder, "run", *grid)
    reached = goals(plan, first, second)
    for goal in reached:
        print(goal.line())
    if given.out:
        calls = {"plan": asdict(plan), "first_run": asdict(first), "second_run": asdict(second)}
        figures = {**about(), "grid": grid[1:], **calls, "goals": [asdict(g) for g in reached]}
        given.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
