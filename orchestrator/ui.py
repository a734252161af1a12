"""`bitgrid ui`: MLflow's dashboard on the tracking database, on 127.0.0.1, for as long as this command runs."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from orchestrator.dashboard_view import page
from orchestrator.errors import TrackingError
from orchestrator.mlflow_setup import OUT_OF_DATE, sqlite_file, switch_off_telemetry
from orchestrator.signals import stopping_signals
from orchestrator.tracking import TrackingSettings

HOST = "127.0.0.1"
PORTS = 65536
START_LIMIT_S = 120.0
STOP_LIMIT_S = 4.0


def serve_ui(
    settings: Mapping[str, Any],
    project_dir: Path,
    port: int = 5000,
    say: Callable[[str], None] = print,
    started_in: Path | None = None,
    sweep: str | None = None,
    typed: Callable[[str], str] = "bitgrid {}".format,
) -> int:
    """Serve until Ctrl-C (or SIGTERM, or the terminal is closed); the exit code.

    A taken `port` gives the next free one. With tracking=mlflow_server the address of the server is named and nothing is started.
    `started_in`: the folder of the sweep's last start, for the message that there is no database. `sweep`: key of the one to open at; None:
    that started last. `typed`: a verb and its arguments ▸ how they are typed here.

    Raises:
        TrackingError: tracking is off, there is no database yet or it is none, `port` is none, or the server does not start.
    """
    known = TrackingSettings.of(settings, project_dir)
    if known.kind == "mlflow_server":
        say(f"The dashboard is on the tracking server: {known.uri}")
        return 0
    if known.kind == "none":
        raise TrackingError(
            f"tracking=none keeps no MLflow runs; `{typed('reconcile tracking=mlflow')}` makes them from the store, "
            f"and `{typed('ui tracking=mlflow')}` shows them"
        )
    file = sqlite_file(known.uri or "")
    if file is not None:
        _check_database(file, started_in if started_in != project_dir else None, typed("reconcile"))
    chosen = free_port(port)
    if chosen != port:
        say(f"Port {port} is taken; {chosen} is used.")
    with tempfile.TemporaryFile() as log, stopping_signals():
        server = start_server(known, chosen, log)
        try:
            say("Starting the dashboard ...")
            if not wait_until_up(server, chosen):
                log.seek(max(0, log.tell() - 2000))
                tail = log.read().decode(errors="replace").strip()
                if OUT_OF_DATE in tail:
                    remedy = "run `mlflow db upgrade` on it" if file is None else f"`{typed('reconcile')}` upgrades it, and keeps a copy"
                    raise TrackingError(f"{file or known.uri} was written by another version of MLflow; {remedy}")
                raise TrackingError(f"the MLflow server did not start on {HOST}:{chosen}; its last words:\n{tail}")
            where = "" if file is None else sweep_page(file, known.experiment, sweep)
            say(f"MLflow dashboard: http://{HOST}:{chosen}/{where}   (Ctrl-C ends it)")
            code = server.wait()
            raise TrackingError(f"the MLflow server ended by itself with exit code {code}")
        except KeyboardInterrupt:
            return 0
        finally:
            stop_server(server)


def _check_database(file: Path, started_in: Path | None, reconcile: str) -> None:
    if not file.is_file():
        there = f"the sweep was started in {started_in}: go there, or " if started_in is not None else ""
        raise TrackingError(
            f"there is no MLflow database at {file}; {there}run a sweep with tracking=mlflow, or `{reconcile}` to make it from the store"
        )
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            db.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.OperationalError as e:
        raise TrackingError(f"the MLflow database {file} cannot be read: {e}") from e
    except sqlite3.DatabaseError as e:
        raise TrackingError(f"{file} is no database ({e}); move it away, and `{reconcile}` makes it from the store") from e


def server_command(settings: TrackingSettings, port: int) -> list[str]:
    """One worker process serves one person; artifacts are read where the runs say they are."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", str(settings.uri)]
    if settings.artifact_location:
        command += ["--default-artifact-root", settings.artifact_location]
    return [*command, "--host", HOST, "--port", str(port), "--workers", "1"]


def start_server(settings: TrackingSettings, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that Ctrl-C reaches this process alone and it can end the whole group."""
    switch_off_telemetry()
    # No background jobs: they are for MLflow's judges and traces, and cost a process.
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    command = server_command(settings, port)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env)


def free_port(wanted: int, tries: int = 50) -> int:
    """`wanted`, or the next port nobody listens on. Raises TrackingError."""
    if not 0 < wanted < PORTS:
        raise TrackingError(f"port {wanted} is none; give a whole number from 1 to {PORTS - 1} with --port")
    end = min(wanted + tries, PORTS)
    for port in range(wanted, end):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((HOST, port))
            except OSError:
                continue
            return port
    raise TrackingError(f"ports {wanted} to {end - 1} are all taken; give another with --port")


def sweep_page(file: Path, experiment: str, sweep: str | None = None) -> str:
    """Where the dashboard opens: the view of a sweep, by its key, or of the one started last, read from the database; the front page where
    it cannot be told."""
    query = (
        "select e.experiment_id, t.value from experiments e join runs r on r.experiment_id = e.experiment_id "
        "join tags t on t.run_uuid = r.run_uuid and t.key = 'bitgrid.sweep_key' "
        "join tags k on k.run_uuid = r.run_uuid and k.key = 'bitgrid.kind' and k.value = 'sweep' "
        "where e.name = ? and t.value = coalesce(?, t.value) and e.lifecycle_stage = 'active' and r.lifecycle_stage = 'active' "
        "order by r.start_time desc limit 1"
    )
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            row = db.execute(query, (experiment, sweep)).fetchone()
    except sqlite3.Error:
        return ""
    return "" if row is None else page(str(row[0]), str(row[1]))


def wait_until_up(server: subprocess.Popen[bytes], port: int) -> bool:
    # Straight to the server, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit and server.poll() is None:
        try:
            with opener.open(f"http://{HOST}:{port}/health", timeout=2):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server and the workers it started: they are one process group."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sig)
        except ProcessLookupError:
            break
        try:
            server.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            continue
        if not _group_lives(server.pid):
            break
    server.wait()


def _group_lives(group: int) -> bool:
    limit = time.monotonic() + STOP_LIMIT_S
    while time.monotonic() < limit:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True
