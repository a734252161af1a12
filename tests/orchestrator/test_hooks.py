"""What the scheduler asks of the store: requests say what a worker needs, and whatever becomes of a stage is told and kept as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cost import what
from orchestrator.hooks import StoreHooks
from orchestrator.ledger import Ledger
from orchestrator.planned import Plan
from orchestrator.retries import Adjustment
from orchestrator.stage import Stage, Status
from orchestrator.store import Store
from workers.request import ErrorClass, Failure, Hints, Outcome
from workers.specs import StageKind

SECONDS = {"started": 1000.0, "ended": 1007.5}


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []

    def status(self, stage: Stage, status: Status, blocked_by: str | None) -> None:
        self.all.append((stage.key, status, blocked_by))

    def failed_attempt(self, stage: Stage, failure: Failure, attempt: int, will_retry: bool) -> None:
        self.all.append((stage.key, failure.log_tail, attempt, will_retry))


class Driven:
    """Hooks on an empty store, for the plan of a quantized and an unquantized model."""

    def __init__(self, root: Path, plan: Plan, ledger: Ledger) -> None:
        self.plan, self.store, self.ledger, self.told = plan, Store(root), ledger, (Told(), Told())
        self.hooks = StoreHooks(self.store, ledger, plan, Hints(device="cpu", batch_tokens=64), self.told)
        self.evaluate = next(s for s in plan.stages.values() if s.kind is StageKind.EVALUATE and s.inputs)
        self.quantize = plan.stages[self.evaluate.inputs["quantize"]]

    def staging(self, stage: Stage, attempt: int) -> Path:
        return Path(self.hooks.request("r", [stage], {stage.key: attempt}, Adjustment()).stages[0].staging)


@pytest.fixture
def driven(tmp_path: Path, plan_of: Any) -> Iterator[Driven]:
    plan = plan_of("method=rtn", "scheme=w4a16_g64")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield Driven(tmp_path, plan, ledger)


def test_a_request_says_where_its_inputs_are_and_how_to_run(driven: Driven) -> None:
    stages = [driven.quantize, driven.evaluate]
    request = driven.hooks.request("r7", stages, {s.key: 2 + i for i, s in enumerate(stages)}, Adjustment(halvings=1, streamed=True))
    assert (request.id, [(s.key, s.kind, s.attempt) for s in request.stages]) == (
        "r7",
        [(driven.quantize.key, "quantize", 2), (driven.evaluate.key, "evaluate", 3)],
    )
    given = request.stages[1].inputs["quantize"]
    assert (given.key, Path(given.path)) == (driven.quantize.key, driven.store.folder(StageKind.QUANTIZE, driven.quantize.key))
    assert request.hints == Hints(device="cpu", batch_tokens=32, streamed=True)
    assert request.models == {digest: source.location for digest, source in driven.plan.models.items()}
    assert request.texts == {digest: source.location for digest, source in driven.plan.texts.items()}


def test_what_a_committed_stage_took_is_known_to_later_estimates(driven: Driven) -> None:
    stage = driven.quantize
    driven.staging(stage, 3)
    driven.hooks.commit(stage, Outcome(stage.key, record={**SECONDS, "seconds": {}, "summary": {}}))
    assert driven.ledger.durations() == {("quantize", stage.model, what(stage.spec)): 7.5}
    record = driven.store.record(stage.kind, stage.key)
    assert (record["attempt"], record["sweep"]) == (3, driven.plan.key)
    # Known by its key: the same stage, computed again, is not two.
    driven.staging(stage, 1)
    driven.store.set_aside(stage.kind, stage.key)
    driven.hooks.commit(stage, Outcome(stage.key, record={"started": 0.0, "ended": 1.5, "seconds": {}, "summary": {}}))
    assert driven.ledger.durations() == {("quantize", stage.model, what(stage.spec)): 1.5}


@pytest.mark.parametrize(("own", "tail"), [("", "block 7"), ("out of memory", "out of memory")])
def test_a_failed_attempt_is_told_and_kept_with_its_log(driven: Driven, own: str, tail: str) -> None:
    """The log that the failure brings; where it brings none, that of its folder, which goes."""
    stage, failure = driven.quantize, Failure(ErrorClass.MEMORY, "OutOfMemoryError", "8 GB", own)
    for attempt, will_retry in ((2, True), (3, False)):
        (driven.staging(stage, attempt) / "log.txt").write_text("block 7\n")
        driven.hooks.failed_attempt(stage, failure, attempt, will_retry)
    assert driven.store.staged() == set()
    assert [t.all for t in driven.told] == [[(stage.key, tail, 2, True), (stage.key, tail, 3, False)]] * 2
    kept = driven.store.attempts(stage.key)
    assert [(k["attempt"], k["sweep"], k["final"], k["log_tail"]) for k in kept] == [
        (2, driven.plan.key, False, tail),
        (3, driven.plan.key, True, tail),
    ]


def test_a_stage_that_never_started_fails_too(driven: Driven) -> None:
    driven.hooks.failed_attempt(driven.quantize, Failure(ErrorClass.INFRASTRUCTURE, "LostWorker", "gone"), 1, True)
    assert driven.told[0].all == [(driven.quantize.key, "", 1, True)]


def test_the_latest_status_is_told_and_remembered(driven: Driven) -> None:
    for status, by in ((Status.FAILED, None), (Status.DEP_FAILED, driven.quantize.key)):
        driven.hooks.status(driven.evaluate, status, by)
    told = [(driven.evaluate.key, Status.FAILED, None), (driven.evaluate.key, Status.DEP_FAILED, driven.quantize.key)]
    assert [t.all for t in driven.told] == [told] * 2
    assert driven.hooks.statuses == {driven.evaluate.key: Status.DEP_FAILED}


def test_a_corrupt_artifact_is_set_aside_where_there_is_one(driven: Driven) -> None:
    """The stage runs again, also where its artifact is gone altogether; of another sweep's nothing is known."""
    stage = driven.quantize
    assert driven.hooks.corrupt("0" * 32) is None
    assert driven.hooks.corrupt(stage.key) is stage
    driven.staging(stage, 1)
    driven.hooks.commit(stage, Outcome(stage.key, record={**SECONDS, "seconds": {}, "summary": {}}))
    assert driven.store.has(stage.kind, stage.key)
    assert driven.hooks.corrupt(stage.key) is stage
    assert not driven.store.has(stage.kind, stage.key)
    assert [p.name.startswith(f"quantize-{stage.key}") for p in (driven.store.root / "corrupt").iterdir()] == [True]
