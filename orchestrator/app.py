"""`bitgrid run` as a Hydra application: Hydra's flags, sweepers and launchers work; bitgrid's own sweeper takes the grid as a whole.

Without flags that only Hydra knows the grid is composed once before Hydra starts, so that a mistake is told in our words; it is kept
for the sweeper. Of a search, whose sweeper chooses the cells, only the settings are looked at.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from orchestrator.cell import Grid
from orchestrator.command import Command, read_flags, refuse_store_flag, refuse_two_modes, shows_only
from orchestrator.errors import BitgridError, ConfigError, SearchError
from orchestrator.launch import bitgrid_task
from orchestrator.run import SweepRun, run_grid, show

exit_codes: list[int] = []
"""Of the sweeps of one command, and of jobs that are none."""
_scores: list[float] = []
"""Of the trials of a sweeper that is not bitgrid's, by which it goes."""
sweeper_folders: dict[Path, None] = {}
"""Where a sweeper that is not bitgrid's writes what it found."""
GO_ON = (
    "the search is stopped, and `bitgrid resume` runs what this launch of it lacks: the same command goes on with the search, and computes "
    "nothing again; with a seed, as hydra.sweeper.sampler.seed=1 of Optuna's sweeper, it chooses the same cells"
)


def run_command(arguments: Sequence[str]) -> int:
    """Exit code of `bitgrid run ARGUMENTS`. Raises BitgridError."""
    refuse_store_flag(arguments)
    given, overrides = read_flags("bitgrid run", arguments)
    refuse_two_modes(given.multirun, overrides)
    searching = False
    if not any(o.startswith("-") for o in overrides):
        try:
            _grid(Command.of_flags(given, overrides))
        except SearchError:
            searching = True
        # Hydra's parser takes overrides in one piece only.
        flags = ["--multirun"] * given.multirun + [f"--config-name={given.config_name}"]
        flags += [] if given.config_dir is None else [f"--config-dir={given.config_dir}"]
        arguments = [*flags, *overrides]
    sys.argv = ["bitgrid run", *arguments]
    exit_codes.clear()
    sweeper_folders.clear()
    _scores.clear()
    try:
        _searched() if searching else task()
    except SystemExit as e:
        if e.code != 1 or not shows_only(overrides):
            raise
        return 2  # Hydra has said what is wrong
    except (HydraException, ValueError) as e:
        if not shows_only(overrides):
            raise
        raise ConfigError(str(e)) from e
    for folder in sweeper_folders:
        if any(f.name != "multirun.yaml" for f in folder.iterdir()):
            print(f"the sweeper's own files: {folder}")
    return max(exit_codes, default=0)


def _searched() -> None:
    """A search by a sweeper that is not bitgrid's. What ends it is told without a traceback, but for an error of the sweeper's own."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra shows an exception itself, and ends the process
    try:
        task()
    except HydraException as e:
        raise ConfigError(str(e)) from e
    except BitgridError as e:
        _failed(f"the search ended with a trial that has no score: {e}")
    except KeyboardInterrupt:
        print(GO_ON)
        raise
    except Exception as e:
        if _scores:
            raise
        _failed(f"no trial of the search has a score: {type(e).__name__}: {e}")
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _failed(message: str) -> None:
    print(f"bitgrid: {message}", file=sys.stderr)
    exit_codes.append(1)


@lru_cache(maxsize=1)
def _grid(command: Command) -> Grid:
    return command.compose()


def sweep(command: Command, grid: Grid | None = None) -> SweepRun:
    """Run the grid of a command line and show how it ended: what bitgrid's sweeper, launcher and task function call.

    `grid` where the caller has composed it already.
    """
    console = Console()
    run = run_grid(_grid(command) if grid is None else grid, command, console)
    show(run, console)
    exit_codes.append(run.exit_code)
    return run


def score(run: SweepRun, evaluate: str, task_name: str) -> float:
    """Primary score of an evaluation. Raises BitgridError when it failed."""
    stage = run.result.stages[evaluate]
    if stage.record is None:
        failed = run.result.stages[stage.blocked_by] if stage.blocked_by else stage
        reason = f"{failed.label}: {failed.failure['message']}" if failed.failure else f"{failed.label}: {failed.status.value}"
        raise BitgridError(f"{stage.label} has no score: {reason}")
    _scores.append(float(stage.summary["scores"][run.result.tasks[task_name].primary]))
    return _scores[-1]


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
@bitgrid_task
def task(config: DictConfig) -> float:
    """One cell: the task function of `bitgrid run` without -m, and of foreign sweepers and launchers."""
    hydra_config = HydraConfig.get()
    overrides = [str(o) for o in hydra_config.overrides.task]
    chosen_by_sweeper = hydra_config.mode is RunMode.MULTIRUN
    try:
        run = sweep(Command.of_hydra(hydra_config, overrides, multirun=False, jobs=[overrides] if chosen_by_sweeper else None))
        if chosen_by_sweeper and run.ending.interrupted:
            raise KeyboardInterrupt  # or the sweeper would go on with its next job
        cell = run.plan.cells[0]
        return score(run, cell.evaluate, cell.cell.task.name)
    except BitgridError as e:
        if chosen_by_sweeper:
            raise
        print(f"bitgrid: {e}", file=sys.stderr)
        raise SystemExit((exit_codes[-1] or 1) if exit_codes else 2) from None
