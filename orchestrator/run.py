"""Run a grid from plan to report: what `bitgrid run`, the sweeper and the launcher all end in."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.cell import Grid
from orchestrator.command import Command, call
from orchestrator.config import check_whole
from orchestrator.cost import estimate, what
from orchestrator.errors import ClusterError, ConfigError, PlanError, StoreLockedError, unknown_name
from orchestrator.executors import open_executor
from orchestrator.executors.settings import ClusterSettings
from orchestrator.fingerprint import digest
from orchestrator.hooks import StoreHooks
from orchestrator.lease import Lease
from orchestrator.ledger import Durations, Ledger
from orchestrator.lines import say
from orchestrator.places import denied_told, expanded, place
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.progress import Progress
from orchestrator.projection import Projection
from orchestrator.report.numbers import count
from orchestrator.results import SweepResult
from orchestrator.retries import Policy
from orchestrator.schedule import run_stages
from orchestrator.signals import StopRequest, stop_on_signals
from orchestrator.sources import ModelSource, Sources
from orchestrator.stage import Resources, Stage, Status
from orchestrator.store import Store, full_disk_told
from orchestrator.sweeps import load_sweep, write_sweep
from orchestrator.toolkits import require_toolkits
from orchestrator.tracked_runs import content_digest
from orchestrator.tracking import SyncReport, TrackingSettings
from workers.failures import DISK_FULL
from workers.request import BACKENDS, Hints
from workers.specs import SPEC_TYPES, Spec, StageKind, from_json

LEAST_HINTS = {
    "threads": 1,
    "batch_tokens": 1,
    "memory_bytes": 1,
    "reference_bytes": 0,
    "quantized_cache": 1,
    "kept_bytes": 0,
    "kept_host_bytes": 0,
}
DONE = (Status.SUCCEEDED, Status.CACHED)
REPORT_MARKER = "report.digest"
"""Beside a report: the state that it tells."""
INTERRUPTED = 130
"""Exit code, as shells have it for Ctrl-C."""


@dataclass(frozen=True)
class Ending:
    """What became of the stages that had to run."""

    statuses: dict[str, Status]
    interrupted: bool = False
    """The user stopped it."""
    lost: str | None = None
    """Why the cluster could not go on."""


@dataclass(frozen=True)
class SweepRun:
    """How a sweep ended."""

    result: SweepResult
    statuses: dict[str, Status]
    """Final status of every stage of the plan; CACHED where nothing had to run."""
    plan: Plan
    report: Path | None
    """The page; None where it could not be written."""
    ending: Ending

    @property
    def unfinished(self) -> bool:
        """Whether `bitgrid resume` has something left that did not fail."""
        return any(not s.finished or s is Status.CANCELLED for s in self.statuses.values())

    @property
    def exit_code(self) -> int:
        """0 when every stage is there, else 1; 130 where the user stopped it before that."""
        if self.ending.interrupted and self.unfinished:
            return INTERRUPTED
        return 0 if all(s in DONE for s in self.statuses.values()) else 1


def sources(settings: Mapping[str, Any], store: Path, preview: bool = False) -> Sources:
    """For a preview nothing is written, and a model may be provisional."""
    folders = {n: expanded(settings[n]) if settings.get(n) else None for n in ("models_dir", "data_dir")}
    cache = store / "cache" / "digests.json" if (store / "store.json").is_file() else None
    return Sources(folders["models_dir"], folders["data_dir"], cache, cache_read_only=preview, allow_provisional=preview)


def store_root(settings: Mapping[str, Any]) -> Path:
    """Raises ConfigError for what names no folder."""
    if not settings["store"]:
        raise ConfigError(f"store={settings['store']!r} is no folder; give one, or leave store out for ./bitgrid-store")
    return place("store=", str(settings["store"]))


def check_settings(settings: Mapping[str, Any]) -> None:
    """What a run with these settings would refuse. Raises ConfigError."""
    hints(settings)
    ClusterSettings.from_config(settings["cluster"])
    TrackingSettings.of(settings["tracking"], Path.cwd())


def missing_stages(plan: Plan, store: Store) -> dict[str, Stage]:
    """Stages that must run: those without an artifact that the sweep's tables, its report or an export still need.

    Quantized variants, evaluations and what the report alone reads are checked here: in a finished sweep no stage reads them, so nothing
    else would find one that is lost or corrupt and make it again.
    """
    needed: dict[str, None] = {}
    waiting = [*plan.wanted]
    for variant in plan.variants.values():
        waiting += [*([variant.quantize] if variant.quantize else []), *variant.evaluations.values()]
    while waiting:
        key = waiting.pop()
        kind = plan.stages[key].kind
        if key in needed or (store.has(kind, key) and (not plan.is_result(key) or store.is_whole(kind, key))):
            continue
        needed[key] = None
        waiting.extend(plan.stages[key].inputs.values())
    return {k: s for k, s in plan.stages.items() if k in needed}


@denied_told()
def run_grid(grid: Grid, command: Command, console: Console, expected: str | None = None) -> SweepRun:
    """Plan, run what is missing, project into MLflow and the report. Raises BitgridError before anything is scheduled.

    Failures of stages do not raise, nor does a cluster that is lost on the way: see `SweepRun.exit_code`. `command` says how
    the grid was asked for, so that the sweep can be resumed; `expected` is the key of the sweep that is to be resumed.
    """
    check_settings(grid.settings)
    store = Store(store_root(grid.settings)).open()
    locked = Lease(store.root / "lease.json", "bitgrid run")
    with full_disk_told(store.root), locked as lease, Ledger(store.root / "ledger.sqlite") as ledger:
        store.clear_staging()
        plan = build_plan(grid, sources(grid.settings, store.root), estimator(ledger.durations()))
        if expected not in (None, plan.key):
            raise PlanError(
                f"the grid of sweep {str(expected)[:8]} is now {plan.key[:8]}: conf, models or texts have changed since; "
                "start that one with `bitgrid run`, it shares whatever is unchanged (`bitgrid explain` tells the difference)"
            )
        write_sweep(store, plan, command)
        return _run(plan, store, ledger, lease, console)


def _run(plan: Plan, store: Store, ledger: Ledger, lease: Lease, console: Console) -> SweepRun:
    missing = missing_stages(plan, store)
    require_toolkits(plan, missing)
    statuses = {k: Status.CACHED for k in plan.stages}
    say(console, _headline(plan, missing))
    for note in plan.notes:
        say(console, f"note: {note}")
    projection = open_projection(plan.grid.settings, store, ledger, plan.key)
    ending = Ending({})
    if missing:
        for stage in missing.values():
            if store.has(stage.kind, stage.key):
                place = store.set_aside(stage.kind, stage.key)
                say(console, f"{stage.label} was corrupt: set aside as {place.name}, runs again")
        ending = _execute(plan, store, ledger, lease, missing, projection, console)
        statuses.update(ending.statuses)
    result = load_sweep(store, plan.key)
    report = try_report(store, result, console)
    for line in sync_lines(project(projection, store, result)):
        say(console, line)
    return SweepRun(result, statuses, plan, report, ending)


def _headline(plan: Plan, missing: Mapping[str, Stage]) -> str:
    kinds = Counter(s.kind.value for s in missing.values())
    todo = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nothing"
    skipped = f", {len(plan.skipped)} skipped" if plan.skipped else ""
    excluded = f", {len(plan.grid.excluded)} excluded" if plan.grid.excluded else ""
    cells, stages = count(len(plan.cells), "cell"), count(len(plan.stages), "stage")
    return f"sweep {plan.key[:8]}: {cells}{skipped}{excluded}, {stages}; to run: {todo}"


@dataclass(frozen=True)
class _Stop:
    """Signals, and a lease that somebody else took over: from then on the store is theirs."""

    signals: StopRequest
    lease: Lease

    @property
    def requested(self) -> bool:
        return self.signals.requested or self.killed

    @property
    def killed(self) -> bool:
        return self.signals.killed or self.lease.lost.is_set()


def _execute(
    plan: Plan, store: Store, ledger: Ledger, lease: Lease, missing: Mapping[str, Stage], projection: Projection, console: Console
) -> Ending:
    """Raises ClusterError where the cluster cannot be started or joined, StoreLockedError where the lease was lost."""
    executor = open_executor(plan.grid.settings)
    run_hints = hints(plan.grid.settings)
    done = {key for key in plan.stages if key not in missing and store.has(plan.stages[key].kind, key)}
    kill, lost = True, None
    try:
        executor.start()
        with Progress(missing, console) as progress, stop_on_signals(console) as signals:
            hooks = StoreHooks(store, ledger, plan, run_hints, (progress, projection))
            stop = _Stop(signals, lease)
            projection.start()
            try:
                run_stages(missing, executor, hooks, Policy(), stop, done=done, variants_per_slot=run_hints.quantized_cache)
                kill = stop.killed
            except ClusterError as e:
                lost = str(e)
    finally:
        executor.stop(kill=kill)
    if lease.lost.is_set():
        raise StoreLockedError(
            f"another driver has taken over the store {store.root} while this one could not renew its lease; "
            "run `bitgrid resume` when it has ended"
        )
    return Ending(hooks.statuses, signals.requested, lost)


def hints(settings: Mapping[str, Any]) -> Hints:
    """Raises ConfigError for a value that no stage could run with."""
    given = {k: v for k, v in (settings.get("hints") or {}).items() if v is not None}
    for name, least in LEAST_HINTS.items():
        check_whole(f"hints.{name}", given.get(name, least), least)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(given.get("device", "auto"))):
        raise ConfigError(f"hints.device={given['device']!r} is no device; use auto, cpu, cuda or cuda:N")
    if given.get("backend", "auto") not in BACKENDS:
        raise ConfigError(unknown_name("hints.backend", str(given["backend"]), BACKENDS))
    _check_device(str(given.get("device", "auto")).partition(":")[0], str(given.get("backend", "auto")))
    return Hints(**{"threads": settings["cluster"].get("threads"), **given})


def _check_device(device: str, backend: str) -> None:
    """What an automatic device makes of a backend is known to workers only."""
    own = "cuda" if backend == "cuda" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1") else backend
    if {device, own} == {"cpu", "cuda"}:
        raise ConfigError(
            f"hints.backend={backend} is for {'CUDA devices' if own == 'cuda' else 'the CPU'}, and hints.device={device} is none; "
            f"use hints.backend=auto, torch or reference, or hints.device={own}"
        )


def estimator(history: Durations) -> Callable[[Spec, ModelSource], Resources]:
    """Estimates from what stages took before, where there is such a history."""
    return lambda spec, model: estimate(spec, model, history)


def remember_durations(ledger: Ledger, result: SweepResult) -> None:
    """What a deleted ledger knew of a sweep's stages."""
    for stage in result.stages.values():
        if stage.seconds is not None:
            spec = from_json(SPEC_TYPES[StageKind(stage.kind)], stage.spec)
            ledger.add_duration(stage.key, stage.kind, spec.model.digest, what(spec), stage.seconds)


def open_projection(settings: Mapping[str, Any], store: Store, ledger: Ledger, key: str) -> Projection:
    """Of a sweep of the store."""
    return Projection(settings["tracking"], Path.cwd(), ledger, partial(load_sweep, store, key), partial(call, store=store.root))


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


def try_report(store: Store, result: SweepResult, console: Console) -> Path | None:
    """`refresh_report`; None, and a line that says why, where it cannot be written: MLflow is written all the same. A full disk raises."""
    try:
        return refresh_report(store, result)
    except OSError as e:
        if e.errno in DISK_FULL:
            raise
        told = f"the report cannot be written: {e}; mend that, then run `{call(f'report {result.key[:8]}', store.root)}`"
        say(console, told)
        return None


def refresh_report(store: Store, result: SweepResult) -> Path:
    """Write the report unless the files that are there tell this very state; path of the page."""
    return current_report(store, result) or renew_report(store, result)


def current_report(store: Store, result: SweepResult) -> Path | None:
    """Path of the page, where the files that are there tell this very state."""
    from orchestrator.report import ReportFiles

    folder = store.sweep_folder(result.key)
    files, marker = ReportFiles.of(folder), folder / REPORT_MARKER
    there = files.all_there() and marker.is_file() and marker.read_text() == _report_state(result)
    return files.html if there else None


def renew_report(store: Store, result: SweepResult) -> Path:
    """Write the report; path of the page."""
    from orchestrator.report import write_report

    folder = store.sweep_folder(result.key)
    files = write_report(result, folder)
    (folder / REPORT_MARKER).write_text(_report_state(result))
    return files.html


def _report_state(result: SweepResult) -> str:
    from orchestrator.report import SCHEMA

    return digest([SCHEMA, content_digest(result), result.model_names, result.model_bytes])


def show(run: SweepRun, console: Console) -> None:
    """The end of `bitgrid run`: table, failures, where the report is, how to open the dashboard, and how to go on."""
    from orchestrator.report import print_table

    print_table(run.result, console)
    store = store_root(run.plan.grid.settings)
    if run.report is not None:
        say(console, f"report: {run.report}")
    if run.result.config["settings"]["tracking"]["kind"] != "none":
        say(console, f"dashboard: {call('ui', store)}")
    if run.ending.lost is not None:
        say(console, run.ending.lost)
    if run.unfinished:
        say(console, f"not finished: `{call(f'resume {run.result.key[:8]}', store)}` runs the rest")
