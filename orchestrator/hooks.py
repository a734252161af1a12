"""What the scheduler asks of the store: requests with locations and staging folders, commits, attempts."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from orchestrator.cost import what
from orchestrator.ledger import Ledger
from orchestrator.planned import Plan
from orchestrator.retries import Adjustment
from orchestrator.stage import Stage, Status
from orchestrator.store import Store
from orchestrator.toolkits import folders_of
from workers.failures import tail
from workers.request import Failure, Hints, Input, Outcome, Request, StageRequest
from workers.specs import to_json


class Listener(Protocol):
    """Told of every transition and failure: progress, tracking."""

    def status(self, stage: Stage, status: Status, blocked_by: str | None) -> None: ...

    def failed_attempt(self, stage: Stage, failure: Failure, attempt: int, will_retry: bool) -> None: ...


class StoreHooks:
    """Implements `orchestrator.schedule.Hooks` for one sweep on one store."""

    def __init__(self, store: Store, ledger: Ledger, plan: Plan, hints: Hints, listeners: Sequence[Listener]) -> None:
        self._store = store
        self._ledger = ledger
        self._plan = plan
        self._hints = hints
        self._listeners = listeners
        self._staging: dict[str, tuple[Path, int]] = {}
        self.statuses: dict[str, Status] = {}
        """The latest of every stage."""

    def request(self, request_id: str, stages: Sequence[Stage], attempts: Mapping[str, int], adjustment: Adjustment) -> Request:
        made = []
        for stage in stages:
            staging = self._store.new_staging(stage.key)
            self._staging[stage.key] = (staging, attempts[stage.key])
            inputs = {role: Input(key, str(self._store.folder(self._plan.stages[key].kind, key))) for role, key in stage.inputs.items()}
            made.append(StageRequest(stage.key, stage.kind.value, to_json(stage.spec), inputs, str(staging), attempts[stage.key]))
        return Request(
            id=request_id,
            stages=tuple(made),
            models={s.model: self._plan.models[s.model].location for s in stages},
            texts={digest: source.location for digest, source in self._plan.texts.items()},
            hints=adjustment.apply(self._hints),
            toolkits=folders_of(self._plan, [s.key for s in stages]),
        )

    def commit(self, stage: Stage, outcome: Outcome) -> None:
        staging, attempt = self._staging.pop(stage.key)
        record = self._store.commit(stage, outcome, staging, attempt, self._plan.key)
        self._ledger.add_duration(stage.key, stage.kind.value, stage.model, what(stage.spec), record["ended"] - record["started"])

    def failed_attempt(self, stage: Stage, failure: Failure, attempt: int, will_retry: bool) -> None:
        staging = self._staging.pop(stage.key, None)
        if staging is not None:
            failure = replace(failure, log_tail=failure.log_tail or tail(staging[0]))  # a worker that was lost could not tell it
            shutil.rmtree(staging[0], ignore_errors=True)
        for listener in self._listeners:
            listener.failed_attempt(stage, failure, attempt, will_retry)
        # Where the disk is full the failure is told here only, and the stage counts as one that has not run.
        with contextlib.suppress(OSError):
            self._store.add_attempt(stage.key, failure, attempt, self._plan.key, final=not will_retry)

    def status(self, stage: Stage, status: Status, blocked_by: str | None) -> None:
        self.statuses[stage.key] = status
        if status is not Status.RUNNING and (left := self._staging.pop(stage.key, None)) is not None:
            shutil.rmtree(left[0], ignore_errors=True)  # of a worker that is lost, or of a stage that was cancelled
        for listener in self._listeners:
            listener.status(stage, status, blocked_by)

    def corrupt(self, key: str) -> Stage | None:
        stage = self._plan.stages.get(key)
        if stage is not None and self._store.has(stage.kind, key):
            self._store.set_aside(stage.kind, key)
        return stage
