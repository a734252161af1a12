"""Runs a plan: what the scheduler decides goes to an executor, what the executor reports goes back, results are committed.

The loop knows neither store nor ledger nor Ray: `Hooks` and `Executor` do. It waits only inside `Executor.poll`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from orchestrator.errors import BitgridError, ClusterError
from orchestrator.executors.base import Executor, RequestEnded, SlotLost, StageEnded
from orchestrator.retries import LOST_WORKER, Adjustment, Policy, poisons_worker, worker_lost
from orchestrator.scheduler import Assignment, Scheduler
from orchestrator.stage import Stage, Status
from workers.failures import DISK_FULL, MAKE_ROOM
from workers.request import ErrorClass, Failure, Outcome, Request

POLL_S = 0.5
"""Longest wait for an event: bounds how late a second Ctrl-C is noticed."""


class Hooks(Protocol):
    """What the loop needs of store and ledger."""

    def request(self, request_id: str, stages: Sequence[Stage], attempts: Mapping[str, int], adjustment: Adjustment) -> Request:
        """Make staging folders and the request; hints are `adjustment.apply(hints)`. May raise OSError or BitgridError."""

    def commit(self, stage: Stage, outcome: Outcome) -> None:
        """Move a successful stage's files into the store. May raise OSError or BitgridError: the stage fails, nothing else."""

    def failed_attempt(self, stage: Stage, failure: Failure, attempt: int, will_retry: bool) -> None:
        """An attempt failed; called before the status changes. `attempt` counts from 1 within this run.

        `will_retry`: it is no final failure; while stopping, the next run tries again.
        """

    def status(self, stage: Stage, status: Status, blocked_by: str | None) -> None:
        """Every transition. `blocked_by`: key of the failed stage, for DEP_FAILED."""

    def corrupt(self, key: str) -> Stage | None:
        """Set the artifact aside; the stage that makes it, or `None` when unknown."""


class Stop(Protocol):
    """See `orchestrator.signals.StopRequest`."""

    @property
    def requested(self) -> bool:
        """Start nothing more; let running stages end."""

    @property
    def killed(self) -> bool:
        """End now."""


def run_stages(
    stages: Mapping[str, Stage],
    executor: Executor,
    hooks: Hooks,
    policy: Policy,
    stop: Stop,
    *,
    done: Collection[str] = (),
    variants_per_slot: int = 1,
) -> dict[str, Status]:
    """Run stages to their final statuses. `done`: keys of inputs that exist in the store.

    The executor is started when there is something to run, and left running: its owner stops it.
    Raises ClusterError when it cannot be started or loses all its workers.
    """
    if not stages:
        return {}
    executor.start()
    scheduler = Scheduler(executor.slots, policy, hooks.status, variants_per_slot=variants_per_slot)
    scheduler.add(stages, done)
    drive(scheduler, executor, hooks, stop)
    return scheduler.statuses


def drive(scheduler: Scheduler, executor: Executor, hooks: Hooks, stop: Stop) -> None:
    """Run until every stage of the scheduler is finished. The executor is started already. Raises ClusterError; what is not done is
    CANCELLED then."""
    loop = _Loop(scheduler, executor, hooks)
    while not scheduler.finished:
        if stop.killed:
            executor.stop(kill=True)
            scheduler.cancel_all()
            return
        if stop.requested:
            scheduler.cancel_pending()
        for assignment in scheduler.assign():
            loop.submit(assignment)
        if scheduler.finished:
            return
        try:
            if not scheduler.slots:
                raise ClusterError(
                    f"every worker of the cluster is lost ({loop.last_loss}); look at the cluster, then run `bitgrid resume`"
                )
            if not scheduler.running and scheduler.next_wait_s() is None:
                raise RuntimeError("the scheduler has unfinished stages, but none that runs, waits or is ready")
            loop.take_events(min(POLL_S, scheduler.next_wait_s() or POLL_S))
        except ClusterError:
            scheduler.cancel_all()
            raise


class _Loop:
    def __init__(self, scheduler: Scheduler, executor: Executor, hooks: Hooks) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._hooks = hooks
        self._to_recycle: set[int] = set()
        self.last_loss = ""

    def submit(self, assignment: Assignment) -> None:
        try:
            request = self._hooks.request(assignment.request_id, assignment.stages, assignment.attempts, assignment.adjustment)
        except (OSError, BitgridError) as e:
            for stage in self._scheduler.request_ended(assignment.request_id):
                self._failed(stage, _failure(e))
            return
        self._executor.submit(assignment.slot, request)

    def take_events(self, timeout_s: float) -> None:
        for event in self._executor.poll(timeout_s):
            if isinstance(event, StageEnded):
                self._stage_ended(event)
            elif isinstance(event, RequestEnded):
                self._request_ended(event)
            else:
                self._slot_lost(event)

    def _stage_ended(self, event: StageEnded) -> None:
        stage, failure = self._scheduler.stage(event.outcome.key), event.outcome.failure
        if failure is None:
            try:
                self._hooks.commit(stage, event.outcome)
            except (OSError, BitgridError) as e:
                failure = _failure(e)
        if failure is None:
            self._scheduler.succeeded(stage.key)
            return
        if poisons_worker(failure):
            self._to_recycle.add(event.slot)
        elif failure.error_class is ErrorClass.MEMORY:
            self._scheduler.slot_reset(event.slot)  # the worker drops its models
        self._failed(stage, failure)

    def _request_ended(self, event: RequestEnded) -> None:
        left = self._scheduler.request_ended(event.request_id)
        reason = event.worker_lost
        if reason is not None:
            self._scheduler.slot_reset(event.slot)
            self._to_recycle.discard(event.slot)
        elif event.slot in self._to_recycle:
            self._to_recycle.remove(event.slot)
            self._executor.recycle(event.slot)
            self._scheduler.slot_reset(event.slot)
        for stage in left:
            self._failed(stage, worker_lost(reason or "the worker ended the request without an outcome for this stage"))

    def _slot_lost(self, event: SlotLost) -> None:
        self.last_loss = event.reason
        self._scheduler.slot_lost(event.slot)
        self._to_recycle.discard(event.slot)
        if event.request_id is not None:
            for stage in self._scheduler.request_ended(event.request_id):
                self._scheduler.requeue(stage.key)

    def _failed(self, stage: Stage, failure: Failure) -> None:
        scheduler = self._scheduler
        attempt = scheduler.attempt(stage.key)
        if failure.error_class is ErrorClass.CANCELLED:
            scheduler.cancel(stage.key)
        elif failure.error_class is ErrorClass.CORRUPT and failure.corrupt_key is not None:
            self._corrupt(stage, failure, failure.corrupt_key)
        elif (retry := scheduler.reaction(stage.key, failure)) is not None:
            self._hooks.failed_attempt(stage, failure, attempt, True)
            scheduler.retry(stage.key, retry)
        elif scheduler.stopping and failure.type == LOST_WORKER:
            self._hooks.failed_attempt(stage, failure, attempt, True)
            scheduler.cancel(stage.key)
        else:
            self._hooks.failed_attempt(stage, failure, attempt, False)
            scheduler.fail(stage.key)

    def _corrupt(self, stage: Stage, failure: Failure, key: str) -> None:
        scheduler, attempt = self._scheduler, self._scheduler.attempt(stage.key)
        if scheduler.recomputed_since(key, stage.key):
            self._hooks.failed_attempt(stage, failure, attempt, True)
            scheduler.requeue(stage.key)
            return
        # Set aside in any case: whoever needs it next must not meet it again.
        producer = self._hooks.corrupt(key)
        if producer is not None and scheduler.stopping:
            self._hooks.failed_attempt(stage, failure, attempt, True)
            scheduler.cancel(stage.key)
        elif producer is None or not scheduler.may_recompute(stage.key):
            self._hooks.failed_attempt(stage, failure, attempt, False)
            scheduler.fail(stage.key)
        else:
            self._hooks.failed_attempt(stage, failure, attempt, True)
            scheduler.recompute(producer, stage.key)


def _failure(error: OSError | BitgridError) -> Failure:
    """The failure of a stage whose request or commit the driver could not make."""
    error_class = ErrorClass.USER
    if isinstance(error, OSError):
        if error.errno in DISK_FULL:
            return Failure(ErrorClass.DISK_FULL, type(error).__name__, f"{error}; {MAKE_ROOM}")
        error_class = ErrorClass.INFRASTRUCTURE
    return Failure(error_class, type(error).__name__, str(error))
