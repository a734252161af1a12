"""Around MLflow's client, without importing it: environment, and the SQLite database of the embedded default."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OUT_OF_DATE = "out-of-date database schema"
"""In MLflow's message about a database of another version."""
UPGRADE_LIMIT_S = 300


def switch_off_telemetry() -> None:
    """For this process and its children. Before MLflow is imported: it decides then."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"


@contextmanager
def client_environment(timeout_s: float) -> Iterator[None]:
    """MLflow's client is configured by environment variables alone: set while it works, then put back. Telemetry stays off."""
    switch_off_telemetry()
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, math.ceil(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    before = {k: os.environ.get(k) for k in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for k, v in before.items():
            if v is None:
                os.environ.pop(k, None)
            else:
                os.environ[k] = v


def sqlite_file(uri: str) -> Path | None:
    """File of a `sqlite:///` address; None for any other address and for a database in memory."""
    prefix = "sqlite:///"
    name = uri[len(prefix) :] if uri.startswith(prefix) else ""
    return Path(name) if name and name != ":memory:" else None


def check_sqlite(file: Path, timeout_s: float) -> None:
    """Raises at once what MLflow would only report after a minute of retries: OSError, sqlite3.Error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file, timeout=timeout_s, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("ROLLBACK")


@contextmanager
def made_whole_or_empty(file: Path) -> Iterator[None]:
    """A database that is empty at first is so again where making its tables fails, as on a full disk: MLflow goes on with none that has
    some of them. Emptied in place, for MLflow keeps the file open."""
    new = file.stat().st_size == 0
    try:
        yield
    except Exception:
        if new:
            for rest in ("-journal", "-wal", "-shm"):
                file.with_name(file.name + rest).unlink(missing_ok=True)
            os.truncate(file, 0)
        raise


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """While it lasts no other driver creates or migrates the database: MLflow makes tables one by one, and two that make the same fail.

    Where files cannot be locked it begins at once. Raises TimeoutError when another one does not end.
    """
    lock = file.with_name(f".{file.name}.lock")
    with lock.open("a") as held:
        until = time.monotonic() + UPGRADE_LIMIT_S
        while fcntl is not None:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has held {lock} for {UPGRADE_LIMIT_S} s") from None
                time.sleep(0.05)
            except OSError:
                break
        try:
            yield
        finally:
            # Those who wait have it open. Who comes later makes another, and finds the tables.
            lock.unlink(missing_ok=True)


def sqlite_runs(file: Path, experiments: Collection[str], sweep: str, timeout_s: float) -> set[str | None]:
    """Variant keys of a sweep's active runs, None for its own run; empty for a database that cannot be read, or of no MLflow.

    Raw SQL, for importing MLflow takes longer than all else that a finished sweep does. Nothing is written.
    """
    query = """
        SELECT variant.value, experiments.name FROM tags AS sweep
        JOIN runs ON runs.run_uuid = sweep.run_uuid AND runs.lifecycle_stage = 'active'
        JOIN experiments ON experiments.experiment_id = runs.experiment_id AND experiments.lifecycle_stage = 'active'
        LEFT JOIN tags AS variant ON variant.run_uuid = runs.run_uuid AND variant.key = 'bitgrid.variant_key'
        WHERE sweep.key = 'bitgrid.sweep_key' AND sweep.value = ?
    """
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=timeout_s)) as db:
            return {key for key, experiment in db.execute(query, (sweep,)) if experiment in experiments}
    except sqlite3.Error:
        return set()


def upgrade_sqlite(file: Path) -> str:
    """Migrate a database of an older MLflow, keeping a copy; what was done, in words. Raises RuntimeError."""
    copy = file.with_name(f"{file.name}.{int(time.time())}.bak")
    shutil.copy2(file, copy)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=UPGRADE_LIMIT_S, check=False)
    if done.returncode:
        copy.replace(file)
        last = " ".join(done.stderr.split())[-300:]
        raise RuntimeError(
            f"{file} was written by another version of MLflow and cannot be upgraded ({last}); move it away and run `bitgrid reconcile`"
        )
    return f"{file.name} was written by an older MLflow and was upgraded; the old one is {copy.name}"
