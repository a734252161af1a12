"""Run a grid from plan to report: what `bitgrid run`, the sweeper and the launcher all end in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.cell import Grid
from orchestrator.cost import estimate
from orchestrator.errors import ConfigError, PlanError
from orchestrator.executors import open_executor
from orchestrator.hooks import StoreHooks
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.progress import Progress
from orchestrator.projection import Projection
from orchestrator.results import SweepResult
from orchestrator.schedule import Policy, run_stages
from orchestrator.signals import stop_on_signals
from orchestrator.sources import ModelSource, Sources
from orchestrator.stage import Resources, Stage, Status
from orchestrator.store import Store, full_disk_told
from orchestrator.sweeps import load_sweep, write_sweep
from orchestrator.tracked_runs import content_digest
from orchestrator.tracking import SyncReport
from workers.request import Hints
from workers.specs import Spec

LEAST_HINTS = {"threads": 1, "batch_tokens": 1, "memory_bytes": 1, "reference_bytes": 0, "quantized_cache": 1}
FAILED = (Status.FAILED, Status.DEP_FAILED, Status.CANCELLED, Status.PENDING)


@dataclass(frozen=True)
class SweepRun:
    """How a sweep ended."""

    result: SweepResult
    statuses: dict[str, Status]
    """Final status of every stage of the plan; CACHED where nothing had to run."""
    plan: Plan
    report: Path | None = None

    @property
    def exit_code(self) -> int:
        """0 when every evaluation is there, else 1."""
        return 1 if any(self.statuses[c.evaluate] in FAILED for c in self.plan.cells) else 0


def sources(settings: Mapping[str, Any], store: Path, allow_provisional: bool = False) -> Sources:
    folders = {n: Path(settings[n]).expanduser() if settings.get(n) else None for n in ("models_dir", "data_dir")}
    cache = store / "cache" / "digests.json" if (store / "store.json").is_file() else None
    return Sources(folders["models_dir"], folders["data_dir"], cache, allow_provisional)


def store_root(settings: Mapping[str, Any]) -> Path:
    return Path(str(settings["store"])).expanduser().resolve()


def missing_stages(plan: Plan, store: Store) -> dict[str, Stage]:
    """Stages that must run: those without an artifact that an evaluation of the sweep still needs."""
    needed: dict[str, None] = {}
    waiting = [e for v in plan.variants.values() for e in v.evaluations.values()]
    while waiting:
        key = waiting.pop()
        if key in needed or store.has(plan.stages[key].kind, key):
            continue
        needed[key] = None
        waiting.extend(plan.stages[key].inputs.values())
    return {k: s for k, s in plan.stages.items() if k in needed}


def run_grid(grid: Grid, overrides: Sequence[str], multirun: bool, console: Console) -> SweepRun:
    """Plan, run what is missing, project into MLflow and the report. Raises BitgridError before anything is scheduled.

    Failures of stages do not raise: see `SweepRun.exit_code`. `overrides` and `multirun` say how the grid was asked for, so
    that the sweep can be resumed.
    """
    hints(grid.settings)
    store = Store(store_root(grid.settings)).open()
    with full_disk_told(store.root), Lease(store.root / "lease.json", "bitgrid run"), Ledger(store.root / "ledger.sqlite") as ledger:
        plan = build_plan(grid, sources(grid.settings, store.root), estimator(ledger))
        if plan.provisional:
            raise PlanError(f"the hub was not reached for {', '.join(plan.provisional)}; a plan under provisional keys cannot run")
        write_sweep(store, plan, overrides, multirun)
        return _run(plan, store, ledger, console)


def _run(plan: Plan, store: Store, ledger: Ledger, console: Console) -> SweepRun:
    missing = missing_stages(plan, store)
    statuses = {k: Status.CACHED for k in plan.stages}
    console.print(_headline(plan, missing), highlight=False)
    projection = open_projection(plan.grid.settings, ledger, lambda: load_sweep(store, plan.key))
    if missing:
        store.clear_staging()
        statuses.update(_execute(plan, store, ledger, missing, projection, console))
    result = load_sweep(store, plan.key)
    report = refresh_report(store, result)
    for line in sync_lines(project(projection, store, result)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return SweepRun(result, statuses, plan, report)


def _headline(plan: Plan, missing: Mapping[str, Stage]) -> str:
    kinds = Counter(s.kind.value for s in missing.values())
    todo = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nothing"
    skipped = f", {len(plan.skipped)} skipped" if plan.skipped else ""
    excluded = f", {len(plan.grid.excluded)} excluded" if plan.grid.excluded else ""
    cells, stages = len(plan.cells), len(plan.stages)
    return f"sweep {plan.key[:8]}: {cells} cells{skipped}{excluded}, {stages} stages; to run: {todo}"


def _execute(
    plan: Plan, store: Store, ledger: Ledger, missing: Mapping[str, Stage], projection: Projection, console: Console
) -> dict[str, Status]:
    executor = open_executor(plan.grid.settings)
    run_hints = hints(plan.grid.settings)
    done = {key for key in plan.stages if key not in missing and store.has(plan.stages[key].kind, key)}
    kill = False
    try:
        executor.start()
        with Progress(missing, console) as progress, stop_on_signals(console) as stop:
            hooks = StoreHooks(store, ledger, plan, run_hints, (progress, projection))
            projection.start()
            statuses = run_stages(
                missing, executor, hooks, policy(plan.grid.settings), stop, done=done, variants_per_slot=run_hints.quantized_cache
            )
            kill = stop.killed
            return statuses
    finally:
        executor.stop(kill=kill)


def hints(settings: Mapping[str, Any]) -> Hints:
    """Raises ConfigError for a value that no stage could run with."""
    given = {k: v for k, v in (settings.get("hints") or {}).items() if v is not None}
    for name, least in LEAST_HINTS.items():
        value = given.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"hints.{name}={value!r}; give a whole number from {least}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(given.get("device", "auto"))):
        raise ConfigError(f"hints.device={given['device']!r} is no device; use auto, cpu, cuda or cuda:N")
    return Hints(**{"threads": settings["cluster"].get("threads"), **given})


def policy(settings: Mapping[str, Any]) -> Policy:
    return Policy(fail_fast=bool((settings.get("sweep") or {}).get("fail_fast", False)))


def estimator(ledger: Ledger | None) -> Callable[[Spec, ModelSource], Resources]:
    """Estimates from the ledger's history where there is one."""
    history = {} if ledger is None else ledger.durations()
    return lambda spec, model: estimate(spec, model, history)


def open_projection(settings: Mapping[str, Any], ledger: Ledger, load: Callable[[], SweepResult]) -> Projection:
    return Projection(settings["tracking"], Path.cwd(), ledger, load)


def project(projection: Projection, store: Store, result: SweepResult, reconcile: bool = False) -> SyncReport:
    """Write the sweep to the tracker, its report and plan attached."""
    folder = store.sweep_folder(result.key)
    attachments = {n: folder / n for n in ("report.html", "plan.json") if (folder / n).is_file()}
    return projection.finish(result, attachments, reconcile)


def sync_lines(report: SyncReport) -> Iterator[str]:
    """What is worth saying of a sync."""
    yield from report.notes
    if report.failed:
        yield report.failed
    elif report.created or report.updated:
        yield f"MLflow: {report.created} runs created, {report.updated} updated, {report.unchanged} unchanged"


def refresh_report(store: Store, result: SweepResult) -> Path:
    """Write the report unless the one that is there tells this very state; path of the page."""
    folder = store.sweep_folder(result.key)
    state = content_digest(result)
    page, marker = folder / "report.html", folder / "report.digest"
    if not (page.is_file() and marker.is_file() and marker.read_text() == state):
        from orchestrator.report import write_report

        write_report(result, folder)
        marker.write_text(state)
    return page


def show(run: SweepRun, console: Console) -> None:
    """The end of `bitgrid run`: table, failures, where the report is and how to open the dashboard."""
    from orchestrator.report import print_table

    print_table(run.result, console)
    if run.report is not None:
        console.print(f"report: {run.report}", highlight=False, soft_wrap=True)
    if run.result.config["settings"]["tracking"]["kind"] != "none":
        console.print("dashboard: bitgrid ui", highlight=False)
