"""What every executor does. A test class inherits these and provides `executor`, started, with `run_fake` as its runner."""

from __future__ import annotations

import time
from pathlib import Path

from orchestrator.executors.base import Event, Executor, RequestEnded, StageEnded
from orchestrator.retries import Policy
from orchestrator.schedule import run_stages
from orchestrator.signals import StopRequest
from orchestrator.stage import Status
from tests.orchestrator.fake_runner import fake_request
from tests.orchestrator.virtual_time import VirtualHooks, evaluate, plan, quantize

LIMIT_S = 60.0
"""Only a broken executor needs longer, even on a busy machine."""


def events_until_end(executor: Executor, *request_ids: str) -> list[Event]:
    """All events until these requests ended."""
    waiting, events, until = set(request_ids), [], time.monotonic() + LIMIT_S
    while waiting:
        assert time.monotonic() < until, f"no end of {waiting}; got {events}"
        for event in executor.poll(1.0):
            events.append(event)
            if isinstance(event, RequestEnded):
                waiting.remove(event.request_id)
    return events


def stage_ends(events: list[Event]) -> list[StageEnded]:
    return [e for e in events if isinstance(e, StageEnded)]


def wait_until_exists(path: Path) -> None:
    until = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < until, f"{path} was not written"
        time.sleep(0.01)


class ExecutorContract:
    def test_one_outcome_per_stage_in_order_then_the_end(self, executor: Executor) -> None:
        executor.submit(0, fake_request("r", a={}, b={}, c={}))
        events = events_until_end(executor, "r")
        assert [e.outcome.key for e in stage_ends(events)] == ["a", "b", "c"]
        assert events[-1] == RequestEnded("r", 0)

    def test_a_failing_stage_stops_no_other(self, executor: Executor) -> None:
        executor.submit(0, fake_request("r", a={"fail": "NaN"}, b={}))
        failed, succeeded = stage_ends(events_until_end(executor, "r"))
        assert failed.outcome.failure is not None
        assert failed.outcome.failure.message == "NaN"
        assert succeeded.outcome.failure is None

    def test_outcomes_come_while_the_request_runs(self, executor: Executor, tmp_path: Path) -> None:
        executor.submit(0, fake_request("r", a={}, b={"wait_for": str(tmp_path / "go")}))
        events: list[Event] = []
        until = time.monotonic() + LIMIT_S
        while not events and time.monotonic() < until:
            events += executor.poll(1.0)
        assert [e.outcome.key for e in stage_ends(events)] == ["a"]
        (tmp_path / "go").touch()
        assert [e.outcome.key for e in stage_ends(events_until_end(executor, "r"))] == ["b"]

    def test_poll_gives_nothing_when_nothing_happens(self, executor: Executor) -> None:
        assert executor.poll(0.01) == []

    def test_all_slots_run_at_once(self, executor: Executor, tmp_path: Path) -> None:
        started = [tmp_path / str(i) for i in range(executor.slots)]
        for i, path in enumerate(started):
            others = started[(i + 1) % len(started)]
            executor.submit(i, fake_request(f"r{i}", **{f"s{i}": {"started": str(path), "wait_for": str(others)}}))
        events = events_until_end(executor, *(f"r{i}" for i in range(executor.slots)))
        assert len(stage_ends(events)) == executor.slots

    def test_an_exception_outside_stages_loses_the_worker_not_the_slot(self, executor: Executor) -> None:
        executor.submit(0, fake_request("r", a={}, b={"raise": "broken worker"}, c={}))
        events = events_until_end(executor, "r")
        assert [e.outcome.key for e in stage_ends(events)] == ["a"]
        assert isinstance(events[-1], RequestEnded)
        assert "broken worker" in (events[-1].worker_lost or "")
        executor.submit(0, fake_request("next", a={}))
        assert events_until_end(executor, "next")[-1] == RequestEnded("next", 0)

    def test_start_again_changes_nothing(self, executor: Executor) -> None:
        slots = executor.slots
        executor.start()
        assert executor.slots == slots

    def test_a_recycled_slot_works(self, executor: Executor) -> None:
        executor.recycle(0)
        executor.submit(0, fake_request("r", a={}))
        assert len(stage_ends(events_until_end(executor, "r"))) == 1

    def test_the_scheduler_runs_a_plan_on_it(self, executor: Executor) -> None:
        stages = plan(quantize("q"), *(evaluate(f"e{i}", variant="q") for i in range(4)))
        hooks = VirtualHooks(stages)
        assert run_stages(stages, executor, hooks, Policy(), StopRequest()) == dict.fromkeys(stages, Status.SUCCEEDED)
        assert hooks.commits[0] == "q"
