"""bitgrid beside the official Hydra launcher for Ray, on one grid: wall time of both, start-up included, after equal scores.

    python bench/launcher.py --models FOLDER --data FOLDER --peer-python ENV/bin/python [--limit WINDOWS]
    python bench/launcher.py --demo --peer-python ENV/bin/python

The peer's environment is made from requirements/bench-peer.txt. Both get the same cores: one worker a core, one thread each. They take
turns of a minute, the other being stopped meanwhile, and a program's time is that of its turns: the speed of a machine may drift by a
third within the hour or two that this takes. `--turn 0` runs one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
GRID = [
    "model=wikitext_llama",
    "method=rtn,gptq,awq,smoothquant",
    "scheme=w4a16_g64,w3a16_g64,w2a16_g64,w8a8,w4a16_channel",
    "task=wikitext2,c4,tinystories",
]
DEMO = [
    "method=rtn,gptq,awq",
    "scheme=w8a16_channel,w4a16_channel,w3a16_channel,w2a16_channel,w4a16_g64",
    "task=self_perplexity,self_divergence",
    "calibration=self_text",
]
TOLERANCE = 1e-6
"""Relative: thread counts are equal, so only summation order in batches may differ."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="windows per task; all when left out")
    parser.add_argument("--demo", action="store_true", help="the demo grid on the shipped model and text")
    parser.add_argument("--turn", type=float, default=60, help="seconds of a turn; 0: one program after the other")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    if 0 < given.turn < 40:
        parser.error(f"--turn {given.turn:g} may stop a cluster while it starts, which fails; give 40 or more, or 0")
    grid = list(DEMO if given.demo else GRID)
    if given.models and given.data:
        grid += [f"models_dir={given.models.resolve()}", f"data_dir={given.data.resolve()}"]
    if given.limit:
        grid.append(f"task.params.limit={given.limit}")
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("bitgrid", "peer")]
        for place in places:
            place.mkdir()
        starts = [lambda: start_ours(grid, places[0]), lambda: start_peer(grid, places[1], given.peer_python.absolute())]
        ours_s, peer_s = take_turns(starts, given.turn or float("inf"))
        ours, peer = our_scores(places[0]), peer_scores(places[1])
    wrong = [c for c in ours.keys() & peer.keys() if abs(ours[c] - peer[c]) > TOLERANCE * abs(peer[c])]
    missing = ours.keys() ^ peer.keys()
    print(f"correctness: {len(peer)} cells, {len(wrong)} differ by more than {TOLERANCE:g} relative, {len(missing)} in one only")
    if wrong or missing:
        for cell in [*wrong, *missing]:
            print(f"  {cell}: ours {ours.get(cell)}, peer {peer.get(cell)}")
        return 1
    figures = {
        "cells": len(peer),
        "bitgrid_s": round(ours_s, 1),
        "hydra_ray_launcher_s": round(peer_s, 1),
        "ratio": round(peer_s / ours_s, 2),
        "turn_s": given.turn,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "grid": [g for g in grid if not g.startswith(("models_dir", "data_dir"))],
    }
    print(f"bitgrid {ours_s:.1f} s · hydra-ray-launcher {peer_s:.1f} s · {peer_s / ours_s:.2f} times faster")
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def environment(**more: str) -> dict[str, str]:
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return {**os.environ, **quiet, **more}


def take_turns(starts: Sequence[Callable[[], subprocess.Popen[bytes]]], turn_s: float) -> list[float]:
    """Seconds that each program ran, start-up included. Raises CalledProcessError for one that fails."""
    running: list[subprocess.Popen[bytes] | None] = [None] * len(starts)
    used, left = [0.0] * len(starts), set(range(len(starts)))
    try:
        while left:
            for i in sorted(left):
                begin = time.perf_counter()
                program = running[i]
                if program is None:
                    program = running[i] = starts[i]()
                else:
                    signal_tree(program.pid, psutil.Process.resume)
                try:
                    code = program.wait(None if len(left) == 1 or turn_s == float("inf") else turn_s)
                    left.remove(i)
                    if code:
                        raise subprocess.CalledProcessError(code, program.args)
                except subprocess.TimeoutExpired:
                    signal_tree(program.pid, psutil.Process.suspend)
                used[i] += time.perf_counter() - begin
    finally:
        for program in running:
            if program is not None and program.poll() is None:
                signal_tree(program.pid, psutil.Process.kill)
    return used


def signal_tree(pid: int, send: Callable[[psutil.Process], None]) -> None:
    """To a process and all that it started; again for those that were started meanwhile."""
    told: set[psutil.Process] = set()
    while True:
        try:
            root = psutil.Process(pid)
            new = {root, *root.children(recursive=True)} - told
        except psutil.NoSuchProcess:
            return
        if not new:
            return
        for process in new:
            with suppress(psutil.NoSuchProcess):
                send(process)
        told |= new


def start_ours(grid: list[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orchestrator.cli", "run", "-m", *grid]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=sys.stderr)


def our_scores(folder: Path) -> dict[str, float]:
    """By cell."""
    sys.path.insert(0, str(ROOT))
    from orchestrator.store import Store
    from orchestrator.sweeps import load_sweep

    store = Store(folder / "bitgrid-store")
    key = store.sweep_keys()[0]
    plan = json.loads((store.sweep_folder(key) / "plan.json").read_text())
    stages = load_sweep(store, key).stages
    scores = {}
    for cell in plan["cells"]:
        summary = stages[cell["evaluate"]].summary
        scores[name_of(cell)] = float(summary["scores"][summary["primary"]])
    return scores


def start_peer(grid: list[str], folder: Path, python: Path) -> subprocess.Popen[bytes]:
    ray = ["hydra/launcher=ray", "hydra/sweeper=basic"]
    ray += [f"+hydra.launcher.ray.init.num_cpus={os.cpu_count()}", "+hydra.launcher.ray.remote.num_cpus=1"]
    command = [str(python), str(ROOT / "bench" / "peer_app.py"), "-m", *ray, *grid]
    more = environment(BITGRID_PEER_SCORES=str(folder / "scores.jsonl"), RAY_AUTH_MODE="disabled")
    return subprocess.Popen(command, cwd=folder, env=more, stdout=sys.stderr)


def peer_scores(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    return {name_of(r["cell"]): r["score"] for r in rows}


def name_of(cell: dict[str, str]) -> str:
    # Options swept by value carry it in their name in a grid and not in a single cell.
    return " ".join(cell[axis].split("[")[0] for axis in ("model", "method", "scheme", "calibration", "task", "replicate"))


if __name__ == "__main__":
    sys.exit(main())
