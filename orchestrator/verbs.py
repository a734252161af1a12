"""The verbs that work on a sweep of the store: status, report, reconcile, resume, export, ui."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from orchestrator.command import call
from orchestrator.errors import BitgridError, ConfigError, StoreError, unknown_name
from orchestrator.grid import compose_grid
from orchestrator.hydra_bridge import as_text, override_text
from orchestrator.lease import Lease, holder
from orchestrator.ledger import Ledger
from orchestrator.lines import say
from orchestrator.places import place
from orchestrator.report import print_table
from orchestrator.results import StageResult, SweepResult, VariantResult
from orchestrator.run import (
    current_report,
    open_projection,
    project,
    remember_durations,
    renew_report,
    run_grid,
    show,
    sync_lines,
    try_report,
)
from orchestrator.signals import run_child
from orchestrator.stage import Status
from orchestrator.store import Store, full_disk_told
from orchestrator.sweeps import find_sweep, last_command, load_sweep


def _open(root: Path) -> Store:
    return Store(place("--store ", root)).open(create=False)


def status(root: Path, sweep: str | None, console: Console) -> int:
    store = _open(root)
    key = find_sweep(store, sweep)
    driver = holder(store.root / "lease.json")
    result = load_sweep(store, key, store.staged() if driver else ())
    counts = Counter((s.kind, s.status.value) for s in result.stages.values())
    say(console, f"sweep {result.key[:8]} {result.name}")
    for (kind, word), count in sorted(counts.items()):
        say(console, f"  {kind:<10} {word:<10} {count}")
    for stage in result.stages.values():
        if stage.status is Status.FAILED and stage.failure is not None:
            told = f"  FAILED {stage.label}: {stage.failure['type']}: {stage.failure['message']}"
            say(console, told)
    say(console, f"  driver: {driver}" if driver else "  no driver is at work on this store")
    return 0


def report(root: Path, sweep: str | None, console: Console) -> int:
    store = _open(root)
    result = load_sweep(store, find_sweep(store, sweep))
    print_table(result, console)
    try:
        page = renew_report(store, result)
    except OSError as e:
        there = current_report(store, result)
        if there is None:
            raise StoreError(f"the report cannot be written: {e}; what is there is of an earlier time, the table above is of now") from e
        page = there  # of a store that is for reading
    say(console, f"report: {page}")
    return 0


def reconcile(root: Path, sweep: str | None, overrides: Sequence[str], console: Console) -> int:
    """`overrides` of the tracking group replace a sweep's own. Exit code 1 when MLflow could not be written whole."""
    store = _open(root)
    elsewhere = compose_grid(overrides, multirun=False).settings if overrides else None
    keys = [find_sweep(store, sweep)] if sweep else list(reversed(store.sweep_keys()))
    failed = False
    with full_disk_told(store.root), Lease(store.root / "lease.json", "bitgrid reconcile"), Ledger(store.root / "ledger.sqlite") as ledger:
        store.clear_staging()
        for key in keys:
            try:
                result = load_sweep(store, key)
            except StoreError as e:
                if sweep:
                    raise
                say(console, f"{key[:8]} left out: {e}")
                failed = True
                continue
            try_report(store, result, console)
            remember_durations(ledger, result)
            settings = elsewhere or result.config["settings"]
            if settings["tracking"]["kind"] == "none":
                say(console, f"{result.key[:8]} has tracking=none, so that MLflow is not written; give tracking=mlflow to write it")
                continue
            report = project(open_projection(settings, store, ledger, key), store, result, reconcile=True)
            failed = failed or not report.complete
            for line in sync_lines(report):
                say(console, f"{result.key[:8]} {line}")
    return int(failed)


def resume(root: Path, sweep: str | None, console: Console) -> int:
    store = _open(root)
    key = find_sweep(store, sweep)
    settings = load_sweep(store, key).config["settings"]
    # Where these come from the environment, they may have changed since.
    folders = {n: settings[n] for n in ("models_dir", "data_dir", "toolkits_dir") if settings.get(n)} | {"store": str(store.root)}
    command = last_command(store, key).with_overrides([f"{n}={override_text(as_text(str(v)))}" for n, v in folders.items()])
    with _inside(Path(command.folder)):
        run = run_grid(command.compose(), command, console, expected=key)
    show(run, console)
    return run.exit_code


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Relative paths start there, as they did when the sweep was started."""
    before = Path.cwd()
    try:
        os.chdir(folder)
    except OSError as e:
        raise StoreError(f"the sweep was started in {folder}, which cannot be entered ({e}); start it anew with `bitgrid run`") from e
    try:
        yield
    finally:
        os.chdir(before)


def export(root: Path, sweep: str, variant: str, form: str, out: Path, console: Console) -> int:
    store = _open(root)
    result = load_sweep(store, find_sweep(store, sweep))
    chosen = _variant(result, variant)
    if chosen.quantize is None or chosen.quantize.payload is None:
        raise ConfigError(f"variant {chosen.label!r} has no quantized weights ({chosen.status.value}); export takes a quantized variant")
    command = [sys.executable, "-m", "workers.export", "--format", form, "--artifact", str(chosen.quantize.payload.parent)]
    command += [*_model_arguments(result, store, chosen.quantize), "--out", str(place("--out ", out))]
    code = run_child(command, Path(__file__).resolve().parent.parent)
    if code < 0:
        raise BitgridError(f"the export of {chosen.label!r} was ended by {signal.Signals(-code).name}; where memory ran out, give it more")
    if code == 0:
        say(console, f"{chosen.label} exported to {out}")
        parts = {"activation": "activations", "kv": "keys and values"}
        left_out = [words for part, words in parts.items() if any(e.spec.get(part) for e in chosen.evaluations.values())]
        if left_out:
            told = f"note: the scores are of quantized {' and '.join(left_out)} too; the checkpoint quantizes weights only"
            say(console, told)
    return code


def _variant(result: SweepResult, name: str) -> VariantResult:
    words = set(name.replace("·", " ").split())
    found = [v for v in result.variants if v.key.startswith(name) or v.label == name]
    found = found or [v for v in result.variants if words <= set(v.label.split())]
    if len(found) == 1:
        return found[0]
    labels = [v.label for v in found or result.variants]
    if found:
        raise ConfigError(f"variant {name!r} is not the only one: {'; '.join(labels)}")
    raise ConfigError(unknown_name("variant", name, labels))


def _model_arguments(result: SweepResult, store: Store, quantize: StageResult) -> list[str]:
    """Where the export finds the unquantized model: by its content, for several options (dtypes) may share a folder."""
    plan = json.loads((store.sweep_folder(result.key) / "plan.json").read_text())
    known = plan["models"].get(quantize.spec["model"]["digest"])
    if known is None:
        raise StoreError(f"the sweep does not say where the model of {quantize.label!r} was; run it again and export then")
    location = known["location"]
    if location["kind"] == "folder":
        return ["--model", location["path"]]
    return ["--hub-model", location["path"], "--revision", location["revision"]]


def ui(root: Path, sweep: str | None, overrides: Sequence[str], port: int, console: Console) -> int:
    """`overrides` of the tracking group replace the sweep's own."""
    from orchestrator.ui import serve_ui

    store = _open(root)
    key = find_sweep(store, sweep)
    settings = compose_grid(overrides, multirun=False).settings if overrides else load_sweep(store, key).config["settings"]
    return serve_ui(
        settings["tracking"],
        Path.cwd(),
        port,
        partial(say, console),
        Path(last_command(store, key).folder),
        sweep=key if sweep else None,
        typed=partial(call, store=root),
    )
