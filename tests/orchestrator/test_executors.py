"""Executors that need no Ray, their settings, and how many workers a cluster holds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ClusterError, ConfigError
from orchestrator.executors import open_executor
from orchestrator.executors.base import Executor
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.executors.ray import actor
from orchestrator.executors.ray.capacity import WORKER_BYTES, Layout, NodeResources, layout
from orchestrator.executors.ray.head import LOOK_EVERY_S, PATIENCE_S, Head
from orchestrator.executors.settings import ClusterSettings
from tests.orchestrator.executor_contract import ExecutorContract, events_until_end, stage_ends, wait_until_exists
from tests.orchestrator.fake_runner import fake_request, run_fake

LARGE = 64 * WORKER_BYTES


class TestInProcess(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Iterator[Executor]:
        executor = InProcessExecutor(threads=3, runner=run_fake)
        executor.start()
        yield executor
        executor.stop()

    def test_threads_reach_the_stage(self, executor: Executor) -> None:
        executor.submit(0, fake_request("r", a={}))
        (end,) = stage_ends(events_until_end(executor, "r"))
        assert end.outcome.record is not None
        assert end.outcome.record["threads"] == 3


def test_stopping_lets_the_running_stage_end_and_starts_no_other(tmp_path: Path) -> None:
    executor = InProcessExecutor(runner=run_fake)
    executor.start()
    executor.submit(0, fake_request("r", a={"started": str(tmp_path / "on"), "wait_for": str(tmp_path / "go")}, b={}))
    wait_until_exists(tmp_path / "on")
    stopping = threading.Thread(target=executor.stop)
    stopping.start()
    (tmp_path / "go").touch()
    stopping.join()
    assert [e.outcome.key for e in stage_ends(executor.poll(0))] == ["a"]


def test_killing_waits_for_nothing(tmp_path: Path) -> None:
    executor = InProcessExecutor(runner=run_fake)
    executor.start()
    executor.submit(0, fake_request("r", a={"wait_for": str(tmp_path / "go")}))
    executor.stop(kill=True)
    (tmp_path / "go").touch()


def test_settings_choose_the_executor() -> None:
    assert isinstance(open_executor({"cluster": {"kind": "in_process", "threads": 1}}), InProcessExecutor)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ray_locl"}, "nearest: ray_local"),
        ({"slot": 2}, "nearest: slots"),
        ({"slots": 0}, "whole number from 1"),
        ({"threads": True}, "whole number from 1"),
        ({"gpus_per_worker": 1.5}, "fraction"),
        ({"auth": "password"}, "allowed: disabled, token"),
        ({"object_store_mb": 10}, "at least 75"),
        ({"nodes": 0}, "whole number from 1"),
        ({"nodes": 2}, "cluster=ray_existing"),
        ({"address": "10.0.0.1:6379"}, "cluster=ray_existing"),
        ({"kind": "ray_existing", "address": "ray://10.0.0.1:10001"}, "host:port"),
        ({"startup_timeout_s": 0}, "positive"),
    ],
)
def test_wrong_settings_say_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterSettings.from_config(values)


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        (ClusterSettings(), [NodeResources(2, 0, LARGE)], Layout(2, 1, 0)),
        (ClusterSettings(), [NodeResources(16, 0, 4 * WORKER_BYTES)], Layout(4, 4, 0)),
        (ClusterSettings(slots=1), [NodeResources(8, 0, LARGE)], Layout(1, 8, 0)),
        (ClusterSettings(slots=3, threads=2), [NodeResources(8, 0, LARGE)], Layout(3, 2, 0)),
        (ClusterSettings(), [NodeResources(16, 4, LARGE)], Layout(4, 4, 1)),
        (ClusterSettings(gpus_per_worker=0.5), [NodeResources(16, 4, LARGE)], Layout(8, 2, 0.5)),
        (ClusterSettings(gpus_per_worker=0), [NodeResources(4, 4, LARGE)], Layout(4, 1, 0)),
        # The head has no GPU, and its cores are no use to GPU workers.
        (ClusterSettings(), [NodeResources(32, 0, LARGE), NodeResources(8, 2, LARGE)], Layout(2, 4, 1)),
        # 7 cores shared by 4 workers on nodes of 4 and 3: one each still fits.
        (ClusterSettings(slots=5), [NodeResources(4, 0, LARGE), NodeResources(3, 0, LARGE)], Layout(5, 1, 0)),
        (ClusterSettings(threads=3), [NodeResources(8, 0, LARGE)], Layout(2, 3, 0)),
    ],
)
def test_layout(settings: ClusterSettings, nodes: list[NodeResources], expected: Layout) -> None:
    assert layout(settings, nodes) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ClusterSettings(gpus_per_worker=1), "has 0 GPUs"),
        (ClusterSettings(slots=9), "room for 8"),
        (ClusterSettings(slots=2, threads=8), "room for 1"),
        (ClusterSettings(threads=9), "room for 0"),
    ],
)
def test_what_never_fits_is_refused(settings: ClusterSettings, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        layout(settings, [NodeResources(8, 0, LARGE)])


def test_a_head_may_go_and_come_back_but_not_stay_away() -> None:
    seconds = [0.0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        head = Head(f"127.0.0.1:{port}", clock=lambda: seconds[0])
        assert head.is_there(look=True)
    assert head.is_there(), "seen a moment ago"
    for seconds[0] in (LOOK_EVERY_S, PATIENCE_S):
        assert not head.is_there()
    with socket.create_server(("127.0.0.1", port)):
        assert head.is_there(look=True)
    for seconds[0] in (3 * PATIENCE_S, 4 * PATIENCE_S):
        assert not head.is_there(), "nobody looked for a while: it is away since this look only"
    seconds[0] += LOOK_EVERY_S
    with pytest.raises(ClusterError, match="bitgrid resume"):
        head.is_there()


def test_what_cannot_be_imported_early_is_told_by_stages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "HEAVY_MODULES", ("no_such_module",))
    monkeypatch.setattr(actor.signal, "signal", lambda *given: None)  # that of this process is pytest's
    actor.Worker(1, None).warm()
