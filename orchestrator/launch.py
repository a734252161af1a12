"""Behind `hydra/sweeper=bitgrid` and `hydra/launcher=bitgrid`: Hydra's jobs ▸ one grid, and its results ▸ Hydra's JobReturns."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from orchestrator.cell import Cell
from orchestrator.command import Command
from orchestrator.errors import BitgridError, ClusterError, ConfigError, PlanError, SourceError, StoreError
from orchestrator.executors.settings import ClusterSettings

MARK = "bitgrid_task"
"""Attribute of the task function whose jobs are cells."""


def bitgrid_task(function: TaskFunction) -> TaskFunction:
    """Mark a task function as bitgrid's own. Goes below `@hydra.main`, which hands the inner function to plugins."""
    setattr(function, MARK, True)
    return function


def is_bitgrid_task(function: TaskFunction) -> bool:
    return bool(getattr(function, MARK, False))


@dataclass(frozen=True)
class Launch:
    """What Hydra hands to a launcher."""

    context: HydraContext
    task_function: TaskFunction
    master: DictConfig
    jobs: Sequence[Sequence[str]]
    first_number: int

    def prepare(self) -> list[DictConfig]:
        """The composed configuration of each job, with a number and an id; Hydra's logging and folder are set up."""
        setup_globals()
        configure_log(self.master.hydra.hydra_logging, self.master.hydra.verbose)
        Path(str(self.master.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        configs = []
        for number, overrides in enumerate(self.jobs, self.first_number):
            config = self.context.config_loader.load_sweep_config(self.master, list(overrides))
            with open_dict(config):
                config.hydra.job.num = number
                config.hydra.job.id = f"{JobRuntime.instance().get('name')}-{number}"
            configs.append(config)
        return configs


def sweep_grid(master: DictConfig, arguments: Sequence[str]) -> Any:
    """Run the grid of a multirun command line as a whole. Wrong input ends the process with a message, not a traceback."""
    from orchestrator.app import sweep

    try:
        return sweep(Command.of_hydra(master.hydra, arguments, multirun=True))
    except BitgridError as error:
        raise _ended(error) from None


def _ended(error: BitgridError) -> SystemExit:
    """Of the whole process, for wrong input: Hydra would show a traceback."""
    print(f"bitgrid: {error}", file=sys.stderr)
    return SystemExit(2)


def launch_cells(launch: Launch) -> list[JobReturn]:
    """The jobs of a foreign sweeper as one grid; in order, the primary score of each or the reason why it has none."""
    from orchestrator.app import score, sweep, sweeper_folders

    if not launch.jobs:
        raise _ended(ConfigError("the sweeper asked for no job; give numbers from 1, as hydra.sweeper.n_jobs=5 for Optuna's"))
    asked = [str(o) for o in launch.master.hydra.overrides.task]
    command = Command.of_hydra(launch.master.hydra, asked, multirun=True, jobs=launch.jobs)
    try:
        grid, cells = command.compose_jobs()
    except ConfigError as error:
        return _launch_others(launch, _wrong_jobs(command) or dict.fromkeys(range(len(launch.jobs)), error))
    configs = launch.prepare()
    sweeper_folders[Path(str(launch.master.hydra.sweep.dir))] = None
    try:
        run = sweep(command, grid)
    except (StoreError, SourceError, ClusterError) as error:
        raise _ended(error) from None  # no other values of what is searched would help
    except BitgridError as error:
        return [_returned(launch, c, error) for c in configs]
    if run.ending.interrupted:
        raise KeyboardInterrupt  # or a search would go on with its next launch
    planned = {id_of(c.cell): c for c in run.plan.cells}
    skipped = {id_of(s.cell): s.reason for s in run.plan.skipped}
    returns = []
    for config, cell in zip(configs, cells, strict=True):
        try:
            if id_of(cell) in skipped:
                raise PlanError(f"the cell is impossible: {skipped[id_of(cell)]}")
            outcome: Any = score(run, planned[id_of(cell)].evaluate, cell.task.name)
        except BitgridError as error:
            outcome = error
        returns.append(_returned(launch, config, outcome))
    return returns


def _wrong_jobs(command: Command) -> dict[int, ConfigError]:
    """Number ▸ error of the jobs that cannot be composed."""
    wrong = {}
    for number, job in enumerate(command.jobs or ()):
        try:
            replace(command, jobs=(job,)).compose_jobs()
        except ConfigError as error:
            wrong[number] = error
    return wrong


def _launch_others(launch: Launch, wrong: Mapping[int, ConfigError]) -> list[JobReturn]:
    """A job that cannot be composed, even by Hydra for want of a key, fails alone."""
    from orchestrator.app import exit_codes

    exit_codes.append(1)
    returns = {n: JobReturn(overrides=launch.jobs[n], status=JobStatus.FAILED, _return_value=error) for n, error in wrong.items()}
    others = {n: job for n, job in enumerate(launch.jobs) if n not in wrong}
    if others:
        returns.update(zip(others, launch_cells(replace(launch, jobs=list(others.values()))), strict=True))
    return [returns[n] for n in range(len(launch.jobs))]


def id_of(cell: Cell) -> tuple[int, ...]:
    """Options are equal when they are the same object."""
    return tuple(id(option) for option in cell)


def launch_opaque(launch: Launch, cluster: dict[str, Any], per_job: dict[str, float]) -> list[JobReturn]:
    """One Ray call in a process of its own per job. A process that dies is a FAILED job; nothing is tried twice."""
    from orchestrator.executors.ray.opaque import run_jobs

    configs = launch.prepare()
    kind = "ray_local" if cluster["address"] is None else "ray_existing"
    settings = ClusterSettings(kind=kind, address=cluster["address"], auth=cluster["auth"])
    outcomes = run_jobs(launch.context, launch.task_function, configs, settings, cores=cluster["num_cpus"], per_job=per_job)
    return [o if isinstance(o, JobReturn) else _returned(launch, c, o) for o, c in zip(outcomes, configs, strict=True)]


def _returned(launch: Launch, config: DictConfig, outcome: Any) -> JobReturn:
    """A JobReturn for a job that Hydra's own `run_job` did not run, or did not return from."""
    task_config = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
    with open_dict(config):
        folder = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        config.hydra.runtime.output_dir = os.path.abspath(folder)
    returned = JobReturn(
        overrides=[str(o) for o in config.hydra.overrides.task],
        cfg=task_config,
        hydra_cfg=OmegaConf.masked_copy(config, "hydra"),
        working_dir=os.getcwd(),
        task_name=JobRuntime.instance().get("name"),
        status=JobStatus.FAILED if isinstance(outcome, BaseException) else JobStatus.COMPLETED,
    )
    returned.return_value = outcome
    launch.context.callbacks.on_job_end(config=config, job_return=returned)
    return returned
