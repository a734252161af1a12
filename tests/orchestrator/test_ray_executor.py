"""The Ray executor on a local cluster, and joining one that runs already. One local cluster for the whole module."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError
from orchestrator.executors.base import Event, Executor, RequestEnded
from orchestrator.executors.ray import start
from orchestrator.executors.ray.executor import RayExecutor, _why_lost
from orchestrator.executors.settings import ClusterSettings
from orchestrator.retries import Policy
from orchestrator.schedule import run_stages
from orchestrator.signals import StopRequest
from orchestrator.stage import Status
from tests.orchestrator.executor_contract import LIMIT_S, ExecutorContract, events_until_end, stage_ends, wait_until_exists
from tests.orchestrator.fake_runner import fake_request, run_fake
from tests.orchestrator.virtual_time import VirtualHooks, evaluate, plan, quantize

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@pytest.fixture(scope="module")
def local() -> Iterator[RayExecutor]:
    before = {name: os.environ.get(name) for name in AUTH}
    handler = signal.getsignal(signal.SIGTERM)
    executor = RayExecutor(ClusterSettings(slots=2, threads=1, startup_timeout_s=LIMIT_S), run_fake)
    executor.start()
    assert os.environ["RAY_AUTH_MODE"] == "token", "a local cluster is closed to the network"
    assert signal.getsignal(signal.SIGTERM) is handler
    yield executor
    # A test that failed may have left a stage waiting.
    executor.stop(kill=True)
    assert {name: os.environ.get(name) for name in AUTH} == before


class TestRay(ExecutorContract):
    @pytest.fixture
    def executor(self, local: RayExecutor) -> Executor:
        return local

    def pid(self, executor: Executor, slot: int) -> int:
        executor.submit(slot, fake_request("pid", a={}))
        (end,) = stage_ends(events_until_end(executor, "pid"))
        assert end.outcome.record is not None
        return int(end.outcome.record["pid"])

    def test_workers_are_other_processes_with_fixed_threads(self, executor: Executor) -> None:
        executor.submit(0, fake_request("r", a={}))
        (end,) = stage_ends(events_until_end(executor, "r"))
        record = end.outcome.record
        assert record is not None
        assert record["pid"] != os.getpid()
        assert (record["threads"], record["omp"]) == (1, "1")

    def test_workers_stay_warm(self, executor: Executor) -> None:
        assert self.pid(executor, 1) == self.pid(executor, 1)

    def test_ctrl_c_does_not_reach_workers(self, executor: Executor) -> None:
        pid = self.pid(executor, 1)
        os.kill(pid, signal.SIGINT)
        assert self.pid(executor, 1) == pid

    def test_a_killed_worker_is_reported_and_replaced(self, executor: Executor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        on, go = tmp_path / "on", tmp_path / "go"
        executor.submit(0, fake_request("killed", done={}, under_way={"started": str(on), "wait_for": str(go)}, never={}))
        executor.submit(1, fake_request("other", b={"wait_for": str(go)}))
        wait_until_exists(on)
        killed = int(on.read_text())
        # An answer still on its way dies with the worker, and its stage runs again: kill once the first one is here.
        events: list[Event] = []
        while not stage_ends(events):
            events += executor.poll(LIMIT_S)
        os.kill(killed, signal.SIGKILL)
        events += events_until_end(executor, "killed")
        assert [e.outcome.key for e in stage_ends(events)] == ["done"]
        assert isinstance(events[-1], RequestEnded)
        assert "died" in (events[-1].worker_lost or "")
        go.touch()
        assert events_until_end(executor, "other")[-1] == RequestEnded("other", 1)
        assert self.pid(executor, 0) != killed
        assert capsys.readouterr().out == "", "Ray's own account of it would break the display"

    def test_the_scheduler_retries_what_a_killed_worker_left(self, executor: Executor, tmp_path: Path) -> None:
        stages = plan(quantize("q"), quantize("poison"), quantize("unlucky"), evaluate("e", variant="unlucky"))
        does = {"poison": {"exit": 9}, "unlucky": {"exit": 9, "unless": str(tmp_path / "died")}}

        class Hooks(VirtualHooks):
            def request(self, *arguments):  # type: ignore[no-untyped-def]
                request = super().request(*arguments)
                for stage in request.stages:
                    stage.spec.update(does.get(stage.key, {}))
                return request

        hooks = Hooks(stages)
        statuses = run_stages(stages, executor, hooks, Policy(max_retries=1, backoff_s=0), StopRequest())
        assert statuses == {**dict.fromkeys(stages, Status.SUCCEEDED), "poison": Status.FAILED}
        assert sorted(a[0] for a in hooks.attempts) == ["poison", "poison", "unlucky"]


@dataclass(frozen=True)
class Head:
    """A cluster somebody else runs."""

    address: str
    token: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token, folder = secrets.token_hex(32), tempfile.mkdtemp(prefix="bg-head-", dir="/tmp")
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}"),
    ]
    environment = {**os.environ, "HOME": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield Head(f"127.0.0.1:{port}", token, process)
    process.terminate()
    process.wait(LIMIT_S)
    shutil.rmtree(folder, ignore_errors=True)


JOIN = """
import json, os, socket, sys
from orchestrator.errors import ClusterError
from orchestrator.executors.ray.executor import RayExecutor
from orchestrator.executors.settings import ClusterSettings
from tests.orchestrator.executor_contract import events_until_end, stage_ends
from tests.orchestrator.fake_runner import fake_request, run_fake
from tests.orchestrator.sweeping import SMALL

address, token = sys.argv[1:]

def attempt(token, address=address, **settings):
    os.environ.pop("RAY_AUTH_TOKEN", None)
    if token:
        os.environ["RAY_AUTH_TOKEN"] = token
    executor = RayExecutor(ClusterSettings(kind="ray_existing", address=address, **settings), run_fake)
    try:
        executor.start()
        executor.submit(0, fake_request("r", a={}))
        return [e.outcome.key for e in stage_ends(events_until_end(executor, "r"))]
    except ClusterError as e:
        return str(e)
    finally:
        executor.stop()

def sweep(token):
    # Real stages, from the command line to MLflow.
    from orchestrator.cli import main

    os.environ["RAY_AUTH_TOKEN"] = token
    small = [o for o in SMALL if not o.startswith(("cluster", "tracking"))]
    cluster = ["cluster=ray_existing", f"cluster.address={address}", "cluster.auth=token", "cluster.slots=1", "cluster.threads=1"]
    return main(["run", "-m", "method=gptq", *small, *cluster, "store=store"])

with socket.create_server(("127.0.0.1", 0)) as closed:
    dead = "127.0.0.1:%d" % closed.getsockname()[1]
results = {
    # First, while the head may not be there yet.
    "awaited": attempt(token, nodes=1),
    "too few": attempt(token, nodes=2, startup_timeout_s=1.0),
    "wrong token": attempt("0" * 64),
    "no token": attempt(None, auth="token"),
    "nothing said": attempt(None),
    "disabled": attempt(None, auth="disabled"),
    "dead": attempt(token, address=dead),
    "too much": attempt(token, gpus_per_worker=1),
    "sweep": sweep(token),
    "found token": attempt(token, slots=1),
}
print(json.dumps(results))
"""


@pytest.mark.timeout(600)
def test_joining_a_cluster_with_a_token_and_leaving_it(head: Head, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in AUTH} | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", JOIN, head.address, head.token], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["awaited"] == ["a"]
    assert "has 1 of cluster.nodes=2 nodes after cluster.startup_timeout_s=1" in results["too few"]
    assert "RAY_AUTH_TOKEN" in results["wrong token"]
    assert "none is found; give the cluster's token in RAY_AUTH_TOKEN" in results["no token"]
    assert results["nothing said"] == results["no token"]
    assert "RAY_AUTH_TOKEN" in results["disabled"]
    assert "nothing answers" in results["dead"]
    assert "has 0 GPUs" in results["too much"]
    assert results["sweep"] == 0, done.stdout
    records = [json.loads(p.read_text()) for p in (tmp_path / "store" / "objects").glob("*/*/*/record.json")]
    assert Counter(r["kind"] for r in records) == {"calibrate": 1, "quantize": 1, "evaluate": 2}
    (report,) = re.findall(r"^report: (.+)$", done.stdout, re.MULTILINE)
    assert Path(report).is_file()
    assert re.search(r"^dashboard: .*bitgrid.* ui --store .*store$", done.stdout, re.MULTILINE)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        runs = database.execute("select status, count(*) from runs group by status").fetchall()
    assert runs == [("FINISHED", 3)], "the sweep, its variant and the baseline"
    assert results["found token"] == ["a"], "the cluster outlives its guests"
    assert head.process.poll() is None


LOSE = """
import json, os, subprocess, sys
import psutil
from orchestrator.errors import ClusterError
from orchestrator.executors.ray.executor import RayExecutor
from orchestrator.executors.settings import ClusterSettings
from tests.orchestrator.executor_contract import LIMIT_S, stage_ends
from tests.orchestrator.fake_runner import fake_request, run_fake

if len(sys.argv) > 1:
    try:
        RayExecutor(ClusterSettings(kind="ray_existing", address=sys.argv[1], auth="token"), run_fake).start()
    except ClusterError as e:
        sys.exit(str(e))
executor = RayExecutor(ClusterSettings(slots=1, threads=1, auth="disabled", startup_timeout_s=LIMIT_S), run_fake)
executor.start()
executor.submit(0, fake_request("r", a={}, b={"wait_for": "no such file"}))
while not stage_ends(executor.poll(LIMIT_S)):
    pass

import ray
address = ray.get_runtime_context().gcs_address
with_token = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
guest = subprocess.run([sys.executable, *sys.orig_argv[1:3], address], env=with_token, capture_output=True, text=True)
results = {"token": guest.stderr}
for process in psutil.Process().children(recursive=True):
    if process.name() == "gcs_server" or process.name().startswith("ray::Worker"):
        process.kill()
try:
    while True:
        executor.poll(1.0)
except ClusterError as e:
    results["head"] = str(e)
executor.stop(kill=True)
print(json.dumps(results))
"""


@pytest.mark.timeout(300)
def test_a_cluster_without_a_token_and_then_without_a_head(tmp_path: Path) -> None:
    """Ray itself would end this process without a word of ours, and wait for a new worker until then."""
    environment = {k: v for k, v in os.environ.items() if k not in AUTH} | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LOSE], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert "cluster.auth=disabled" in results["token"]
    assert "let them signal bitgrid alone" in results["head"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "somewhere"])
def test_an_address_that_cannot_be_joined_is_named_as_it_was_given(address: str) -> None:
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS='?{address}"):
        start._check_head(address, "RAY_ADDRESS", "disabled")


def test_what_is_no_ray_is_not_asked_for_a_token() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def refuse() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=refuse, daemon=True).start()
        with pytest.raises(ClusterError, match="not as the head") as caught:
            start._check_head(f"127.0.0.1:{port}", "cluster.address", "disabled")
    assert "token" not in str(caught.value)


def test_a_worker_whose_node_is_gone_is_told_without_rays_ids() -> None:
    import ray

    assert "its node went down" in _why_lost(ray.exceptions.ActorUnavailableError("Socket closed", bytes(16)))


def test_sigterm_while_ray_starts_is_an_interruption() -> None:
    def terminated() -> None:
        with start._own_sigterm():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LIMIT_S)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        terminated()
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_folder_for_sockets_is_an_error_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *given: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ClusterError, match="TMPDIR"):
        start._own_folder()


def test_a_cluster_starts_from_the_main_thread_only() -> None:
    code = """
import threading
from orchestrator.errors import ClusterError
from orchestrator.executors.ray.executor import RayExecutor
from orchestrator.executors.settings import ClusterSettings
def start():
    try:
        RayExecutor(ClusterSettings()).start()
    except ClusterError as e:
        print(e)
thread = threading.Thread(target=start)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert "main thread" in done.stdout


def test_asking_for_what_the_cluster_lacks_is_an_error_at_once(local: RayExecutor) -> None:
    # This process is connected already: the connection is used, and left as it is.
    greedy = RayExecutor(ClusterSettings(slots=64, threads=4), run_fake)
    with pytest.raises(ClusterError, match="do not fit"):
        greedy.start()
    local.submit(0, fake_request("r", a={}))
    assert events_until_end(local, "r")[-1] == RequestEnded("r", 0)
