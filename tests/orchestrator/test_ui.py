"""`bitgrid ui` and a tracking server, for real: one MLflow server that is watched, used, killed and replaced."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from orchestrator import run
from orchestrator.cli import main
from orchestrator.errors import ConfigError, TrackingError
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.mlflow_setup import switch_off_telemetry
from orchestrator.results import SweepResult
from orchestrator.track import COOL_DOWN_S, MlflowTracker
from orchestrator.tracked_runs import Phase
from orchestrator.tracking import TrackingSettings
from orchestrator.ui import HOST, free_port, serve_ui, server_command, start_server, stop_server, sweep_page, wait_until_up
from tests.orchestrator.small_stages import small_stage
from tests.orchestrator.sweeping import sweep as small_sweep
from tests.orchestrator.tracked_sweep import KEY, fixed_delta, full_sweep, started, with_failure

pytestmark = pytest.mark.mlflow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep(tmp_path: Path) -> SweepResult:
    return with_failure(full_sweep(tmp_path / "store"))


@pytest.fixture
def project(tmp_path: Path, sweep: SweepResult, empty_mlflow: Path) -> Path:
    """A project whose database holds the sweep."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    tracker = MlflowTracker(TrackingSettings.of({"kind": "mlflow"}, folder), fixed_delta)
    assert tracker.sync(sweep, Phase.ENDED).failed is None
    tracker.close()
    return folder


def lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_dashboard_is_served_on_this_machine_only_and_ends_with_ctrl_c(project: Path) -> None:
    port = free_port(5600)
    code = (
        "import sys; from pathlib import Path; from orchestrator.ui import serve_ui\n"
        f"sys.exit(serve_ui({{'kind': 'mlflow'}}, Path({str(project)!r}), {port}, say=lambda m: print(m, flush=True)))"
    )
    # A shell that starts it in the background would have it ignore Ctrl-C; a terminal does not.
    ui = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert ui.stdout is not None
        line = next(text for text in ui.stdout if "dashboard:" in text)
        address = line.split()[2]
        assert address.startswith(f"http://{HOST}:{port}/#/experiments/1/runs?")
        assert f"viewStateShareKey=bitgrid-{KEY[:12]}" in address
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{HOST}:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=bitgrid", timeout=20) as answer:
            assert b'"bitgrid"' in answer.read()
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(ui.pid)], capture_output=True, text=True, check=True).stdout.split()
        ui.send_signal(signal.SIGINT)
        assert ui.wait(30) == 0
        assert children
        assert not any(lives(int(c)) for c in children)
    finally:
        ui.kill()
        ui.communicate()


@pytest.fixture
def served(tmp_path: Path, empty_mlflow: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Address of a server on an empty database, and its process, to be killed."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    settings = TrackingSettings.of({"kind": "mlflow", "artifact_location": "mlflow-artifacts:/"}, folder)
    port = free_port(5650)
    running: list[subprocess.Popen[bytes]] = []
    here = os.getcwd()
    os.chdir(folder)
    try:
        with tempfile.TemporaryFile() as log:
            running.append(start_server(settings, port, log))
            assert wait_until_up(running[0], port)
            yield f"http://{HOST}:{port}", running
    finally:
        os.chdir(here)
        for server in running:
            stop_server(server)


def test_a_server_that_dies_mid_sweep_costs_a_reconcile(
    tmp_path: Path, sweep: SweepResult, served: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    address, running = served
    settings = TrackingSettings.of({"kind": "mlflow_server", "uri": address, "timeout_s": 2}, tmp_path)
    now = [0.0]
    tracker = MlflowTracker(settings, fixed_delta, clock=lambda: now[0])
    assert tracker.prepare() is None
    first = tracker.sync(started(sweep, 5), Phase.RUNNING)
    assert first.failed is None
    assert first.created == 3
    assert tracker.sync(started(sweep, 5), Phase.RUNNING).unchanged == 3

    # It hangs: connections are taken and never answered.
    for pid in group_of(running[0].pid):
        os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    hung = tracker.sync(started(sweep, 9), Phase.RUNNING)
    waited = time.monotonic() - begin
    for pid in group_of(running[0].pid):
        os.kill(pid, signal.SIGCONT)
    assert f"bitgrid reconcile {KEY[:12]}" in str(hung.failed)
    assert waited < 60  # MLflow's own defaults wait 8 × 120 s
    assert "reconcile" in str(tracker.sync(started(sweep, 9), Phase.RUNNING).failed)

    # It is back.
    now[0] += COOL_DOWN_S
    back = tracker.sync(sweep, Phase.RUNNING)
    assert (back.failed, back.created) == (None, 3)
    from mlflow.tracking import MlflowClient

    names = {f.path for f in MlflowClient(tracking_uri=address).list_artifacts(back.run_ids["v-rtn-w4"], "tables/quantize")}
    assert "tables/quantize/layers.parquet" in names

    # It dies before the last state is written, which `bitgrid reconcile` does later: here through its database.
    stop_server(running.pop())
    assert "reconcile" in str(tracker.sync(sweep, Phase.ENDED).failed)
    later = MlflowTracker(TrackingSettings.of({"kind": "mlflow", "log_artifacts": False}, Path.cwd()), fixed_delta)
    done = later.reconcile(sweep, Phase.ENDED)
    assert (done.failed, done.created, done.updated) == (None, 0, 6)
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("bitgrid").experiment_id])
    assert sorted(r.info.status for r in runs) == ["FAILED", "FAILED", "FINISHED", "FINISHED", "FINISHED", "FINISHED"]
    later.close()


def group_of(leader: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "-g", str(leader)], capture_output=True, text=True, check=True).stdout
    return [int(p) for p in out.split()]


def test_the_server_is_told_to_listen_here_and_nothing_is_sent_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    command = server_command(TrackingSettings.of({"kind": "mlflow"}, tmp_path), 5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    switch_off_telemetry()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_taken_port_gives_the_next_free_one() -> None:
    with closing(socket.socket()) as s:
        s.bind((HOST, 0))
        s.listen()
        taken = s.getsockname()[1]
        assert free_port(taken) > taken


def test_what_cannot_be_shown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert serve_ui({"kind": "mlflow_server", "uri": "http://mlflow.example:5000"}, tmp_path, say=said.append) == 0
    assert "http://mlflow.example:5000" in said[0]
    with pytest.raises(TrackingError, match="run a sweep"):
        serve_ui({"kind": "mlflow"}, tmp_path)
    with pytest.raises(TrackingError, match=rf"started in {ROOT}: go there, or run a sweep"):
        serve_ui({"kind": "mlflow"}, tmp_path, started_in=ROOT)
    with pytest.raises(TrackingError, match=r"tracking=none.*`bitgrid reconcile tracking=mlflow`.*`bitgrid ui tracking=mlflow`"):
        serve_ui({"kind": "none"}, tmp_path)
    assert not list(tmp_path.iterdir())
    for settings in ({"kind": "none"}, {"kind": "mlflow"}):
        with pytest.raises(TrackingError, match="`here reconcile"):
            serve_ui(settings, tmp_path, typed="here {}".format)
    (tmp_path / "mlflow.db").write_text("what is no database")
    with pytest.raises(TrackingError, match=r"mlflow.db is no database \(.*\); move it away, and `bitgrid reconcile`"):
        serve_ui({"kind": "mlflow"}, tmp_path)


@pytest.mark.parametrize("port", [-5, 0, 65536])
def test_what_is_no_port_is_refused(port: int, project: Path) -> None:
    with pytest.raises(TrackingError, match=f"port {port} is none; give a whole number from 1 to 65535"):
        serve_ui({"kind": "mlflow"}, project, port)


def test_a_database_of_another_mlflow_is_told_with_what_upgrades_it(project: Path) -> None:
    with closing(sqlite3.connect(project / "mlflow.db")) as db:
        db.execute("update alembic_version set version_num = '0584bdc529eb'")
        db.commit()
    with pytest.raises(TrackingError, match=r"mlflow.db was written by another version of MLflow; `bitgrid reconcile` upgrades it"):
        serve_ui({"kind": "mlflow"}, project, free_port(5680))


def test_runs_made_from_the_store_of_a_sweep_without_tracking_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, shown = tmp_path / "store", list[dict[str, object]]()
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))
    small_sweep(store, "method=rtn")
    advice: list[str] = []

    def serve(settings: dict[str, object], *_: object, typed: Callable[[str], str], **__: object) -> int:
        shown.append(settings)
        advice.append(typed("ui"))
        return 0

    monkeypatch.setattr("orchestrator.ui.serve_ui", serve)
    for more in ([], ["tracking=mlflow"]):
        assert main(["ui", "--store", str(store), *more]) == 0
    assert [s["kind"] for s in shown] == ["none", "mlflow"]
    assert all(a.endswith(f" ui --store {store}") for a in advice)


def test_the_page_is_the_latest_sweeps(project: Path) -> None:
    assert f"bitgrid-{KEY[:12]}" in sweep_page(project / "mlflow.db", "bitgrid")
    assert sweep_page(project / "mlflow.db", "another") == ""
    odd = project / "a#1 50%25?"
    odd.mkdir()
    shutil.copy(project / "mlflow.db", odd / "mlflow.db")
    assert f"bitgrid-{KEY[:12]}" in sweep_page(odd / "mlflow.db", "bitgrid")
    shutil.copy(ROOT / "pyproject.toml", project / "not.db")
    assert sweep_page(project / "not.db", "bitgrid") == ""


def test_the_page_is_that_of_the_sweep_which_was_named(
    project: Path, sweep: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = replace(sweep, key="9" * 32, created=sweep.created + 100)
    tracker = MlflowTracker(TrackingSettings.of({"kind": "mlflow"}, project), fixed_delta)
    assert tracker.sync(later, Phase.ENDED).failed is None
    tracker.close()
    database = project / "mlflow.db"
    assert f"bitgrid-{later.key[:12]}" in sweep_page(database, "bitgrid")
    assert f"bitgrid-{KEY[:12]}" in sweep_page(database, "bitgrid", KEY)
    store, named = tmp_path / "small", list[object]()
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))
    key = small_sweep(store, "method=rtn").result.key
    monkeypatch.setattr("orchestrator.ui.serve_ui", lambda *_, sweep, typed: named.append(sweep) or 0)
    for given in ([], [key[:8]]):
        assert main(["ui", "--store", str(store), *given]) == 0
    assert named == [None, key]


@pytest.mark.parametrize(("name", "fits"), [("a?b", False), ("a%25b", False), ("50% ünd a#1", True)])
def test_a_folder_whose_name_an_address_cannot_hold_is_refused(name: str, fits: bool, tmp_path: Path) -> None:
    """SQLAlchemy reads the address; the database would be elsewhere, and the dashboard empty."""
    from sqlalchemy import make_url

    folder = tmp_path / name
    read = make_url(f"sqlite:///{folder / 'mlflow.db'}").database
    # Only SQLAlchemy 2.1, which needs a newer Python than 3.10, takes %25 for another sign.
    assert (read == str(folder / "mlflow.db")) is (fits or ("%" in name and version("sqlalchemy").startswith("2.0")))
    if fits:
        assert make_url(str(TrackingSettings.of({"kind": "mlflow"}, folder).uri)).database == read
        return
    with pytest.raises(ConfigError, match=r"MLflow cannot keep its database in .*run in another folder"):
        TrackingSettings.of({"kind": "mlflow"}, folder)
