"""Composing and planning a large grid of the shipped conf/ beside `hydra.compose`, after a check that both give the same cells.

    python bench/compose.py [--cells 10000]

Prints seconds, resident memory per cell above an empty process, and the ratio per cell.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SWEEP = (
    "method=gptq,gptq_sequential",
    "scheme=w4a16_g64,w3a16_g64,w4a16_channel,w2a16_channel,w8a16_channel",
    "task=self_perplexity,self_divergence",
)
"""20 cells; two swept numbers multiply them."""


def overrides(cells: int) -> list[str]:
    side = max(1, round((cells / 20) ** 0.5))
    seeds = max(1, round(cells / 20 / side))
    return [*SWEEP, f"method.rounding.params.damp=range(0,1,{1 / side!r})", f"replicate.seed=range({seeds})"]


def plan(grid: Any) -> tuple[int, float]:
    """Number of stages, and seconds of planning with imports."""
    start = time.perf_counter()
    from orchestrator.cost import estimate
    from orchestrator.plan import build_plan
    from orchestrator.sources import Sources

    with tempfile.TemporaryDirectory() as folder:
        planned = build_plan(grid, Sources(None, None, Path(folder) / "digests.json"), lambda spec, model: estimate(spec, model, {}))
    return len(planned.stages), time.perf_counter() - start


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def empty_process_kib() -> int:
    code = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def check_and_time_hydra(grid: Any, samples: int) -> float:
    """Seconds of hydra.compose per cell, on random cells; raises AssertionError where a cell differs."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from orchestrator.cell import AXES

    seconds = 0.0
    with initialize_config_module("conf", version_base="1.3"):
        for cell in random.Random(0).sample(grid.cells, samples):
            damp, seed = cell.method.values["rounding"]["params"]["damp"], cell.replicate.values["seed"]
            lines = [f"{o.axis}={o.file}" for o in cell] + [f"method.rounding.params.damp={damp!r}", f"replicate.seed={seed}"]
            start = time.perf_counter()
            config = compose("config", lines)
            seconds += time.perf_counter() - start
            assert OmegaConf.to_container(config, resolve=True) == {**grid.settings, **{a: getattr(cell, a).values for a in AXES}}
    return seconds / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=20, help="cells composed by Hydra")
    given = parser.parse_args()
    empty = empty_process_kib()
    start = time.perf_counter()
    from orchestrator.grid import compose_grid

    imported = time.perf_counter()
    grid = compose_grid(overrides(given.cells), multirun=True)
    composed = time.perf_counter()
    composed_kib = peak_kib() - empty
    stages, planning = plan(grid)
    planned_kib = peak_kib() - empty
    count = len(grid.cells)
    samples, ours = min(given.samples, count), (composed - imported) / count
    hydra = check_and_time_hydra(grid, samples)
    print(f"cells                 {count}, equal to hydra.compose on {samples} random ones")
    print(f"bitgrid               {composed - imported:.2f} s (and {imported - start:.2f} s of imports), {ours * 1e6:.0f} us per cell")
    print(f"planning              {planning:.2f} s for {stages} stages; composing and planning {composed - imported + planning:.2f} s")
    print(f"memory, composed      {composed_kib / 1024:.0f} MiB above an empty process, {composed_kib / count:.2f} KiB per cell")
    print(f"memory, planned       {planned_kib / 1024:.0f} MiB above an empty process, {planned_kib / count:.2f} KiB per cell")
    print(f"hydra.compose         {hydra * 1e3:.1f} ms per cell, {hydra * count:.0f} s for the grid")
    print(f"per cell              {hydra / ours:.0f} times faster")


if __name__ == "__main__":
    main()
