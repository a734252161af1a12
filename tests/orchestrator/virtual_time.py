"""An executor on virtual time, stages to run on it, and hooks that write down what happens: the scheduler's test bench."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

from orchestrator.executors.base import Event, RequestEnded, SlotLost, StageEnded
from orchestrator.retries import Adjustment, Policy
from orchestrator.schedule import drive
from orchestrator.scheduler import Scheduler
from orchestrator.signals import StopRequest
from orchestrator.stage import Resources, Stage, Status
from quant.scheme import WeightScheme
from workers.request import ErrorClass, Failure, Input, Outcome, Request, StageRequest
from workers.specs import (
    CalibrateSpec,
    CalibrationSpec,
    Component,
    EvaluateSpec,
    MethodSpec,
    ModelSpec,
    QuantizeSpec,
    Rule,
    StageKind,
    TaskSpec,
    TextSpec,
)

TEXT = TextSpec("text")


def calibrate(key: str, model: str = "m", statistic: str = "hessian", text: str = "text", seconds: float = 1.0) -> Stage:
    spec = CalibrateSpec(ModelSpec(model), CalibrationSpec(TextSpec(text)), statistic)
    return Stage(key, StageKind.CALIBRATE, spec, f"calibrate {key}", resources=Resources(seconds))


def quantize(key: str, model: str = "m", inputs: Sequence[str] = (), seconds: float = 1.0) -> Stage:
    spec = QuantizeSpec(ModelSpec(model), (Rule("*", MethodSpec(Component("rtn", 1)), WeightScheme(4)),))
    return Stage(key, StageKind.QUANTIZE, spec, f"quantize {key}", {f"input{i}": k for i, k in enumerate(inputs)}, Resources(seconds))


def evaluate(key: str, model: str = "m", variant: str | None = None, seconds: float = 1.0) -> Stage:
    spec = EvaluateSpec(ModelSpec(model), TaskSpec("perplexity", 1, TEXT))
    return Stage(key, StageKind.EVALUATE, spec, f"evaluate {key}", {"quantize": variant} if variant else {}, Resources(seconds))


def plan(*stages: Stage) -> dict[str, Stage]:
    return {s.key: s for s in stages}


def failure(error_class: ErrorClass, message: str = "made to fail", corrupt_key: str | None = None) -> Failure:
    return Failure(error_class, "FakeError", message, corrupt_key=corrupt_key)


Verdict = Failure | str | None
"""What an attempt comes to: a failure, the reason its worker dies, or success."""


@dataclass
class VirtualHooks:
    """Writes down every call. `stages` must hold every stage that may be asked for."""

    stages: dict[str, Stage]
    requests: list[tuple[tuple[str, ...], Adjustment]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    attempts: list[tuple[str, ErrorClass, int, bool]] = field(default_factory=list)
    transitions: list[tuple[str, Status, str | None]] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    commit_error: Callable[[str], Exception | None] = lambda key: None
    request_error: Callable[[str], Exception | None] = lambda key: None
    makers: dict[str, Stage] = field(default_factory=dict)
    """Stages of artifacts that existed before."""

    def request(self, request_id: str, stages: Sequence[Stage], attempts: Mapping[str, int], adjustment: Adjustment) -> Request:
        for stage in stages:
            if (error := self.request_error(stage.key)) is not None:
                raise error
        self.requests.append((tuple(s.key for s in stages), adjustment))
        wanted = tuple(
            StageRequest(s.key, s.kind.value, {}, {r: Input(k, "") for r, k in s.inputs.items()}, "", attempts[s.key]) for s in stages
        )
        return Request(request_id, wanted, {}, {})

    def commit(self, stage: Stage, outcome: Outcome) -> None:
        if (error := self.commit_error(stage.key)) is not None:
            raise error
        self.commits.append(stage.key)

    def failed_attempt(self, stage: Stage, failure: Failure, attempt: int, will_retry: bool) -> None:
        self.attempts.append((stage.key, failure.error_class, attempt, will_retry))

    def status(self, stage: Stage, status: Status, blocked_by: str | None) -> None:
        self.transitions.append((stage.key, status, blocked_by))

    def corrupt(self, key: str) -> Stage | None:
        self.set_aside.append(key)
        return self.stages.get(key) or self.makers.get(key)

    def blocked_by(self) -> dict[str, str | None]:
        return {key: blocked_by for key, status, blocked_by in self.transitions if status is Status.DEP_FAILED}


@dataclass
class _Worker:
    model: str | None = None
    variant: str | None = None


class VirtualExecutor:
    """Slots on virtual time. A stage takes its resources' seconds, plus loading what its worker does not hold.

    `verdict(key, attempt)` says what an attempt comes to. `now` is the virtual clock.
    """

    def __init__(
        self,
        slots: int,
        stages: Mapping[str, Stage],
        verdict: Callable[[str, int], Verdict] = lambda key, attempt: None,
        *,
        load_model_s: float = 0.0,
        load_variant_s: float = 0.0,
        duration: Callable[[Stage], float] = lambda stage: stage.resources.seconds,
    ) -> None:
        self._slots = slots
        self._stages = stages
        self._verdict = verdict
        self._load_model_s = load_model_s
        self._load_variant_s = load_variant_s
        self._duration = duration
        self._events: list[tuple[float, int, Event]] = []
        self._number = count()
        self._workers: dict[int, _Worker] = defaultdict(_Worker)
        self._busy: set[int] = set()
        self.lose_slot: set[int] = set()
        """Slots that are lost for good by the next request on them."""
        self.now = 0.0
        self.starts: list[tuple[float, str, int]] = []
        """(time, key, slot) of every start of a stage."""
        self.model_loads = 0
        self.recycled: list[int] = []
        self.killed = False

    @property
    def slots(self) -> int:
        return self._slots

    def clock(self) -> float:
        return self.now

    def start(self) -> None:
        pass

    def submit(self, slot: int, request: Request) -> None:
        assert slot not in self._busy, f"slot {slot} is taken"
        self._busy.add(slot)
        time_s = self.now
        if slot in self.lose_slot:
            return self._at(time_s, SlotLost(slot, "its node is gone", request.id))
        for wanted in request.stages:
            stage, worker = self._stages[wanted.key], self._workers[slot]
            self.starts.append((time_s, stage.key, slot))
            time_s += self._load(worker, stage) + self._duration(stage)
            verdict = self._verdict(stage.key, wanted.attempt)
            if isinstance(verdict, str):
                self._workers[slot] = _Worker()
                return self._at(time_s, RequestEnded(request.id, slot, verdict))
            record = None if verdict else {"key": stage.key}
            self._at(time_s, StageEnded(request.id, slot, Outcome(stage.key, record, verdict)))
        self._at(time_s, RequestEnded(request.id, slot))

    def poll(self, timeout_s: float) -> list[Event]:
        if not self._events or self._events[0][0] > self.now + timeout_s:
            self.now += timeout_s
            return []
        self.now, _, event = heapq.heappop(self._events)
        if not isinstance(event, StageEnded):
            self._busy.discard(event.slot)
        return [event]

    def recycle(self, slot: int) -> None:
        assert slot not in self._busy
        self._workers[slot] = _Worker()
        self.recycled.append(slot)

    def stop(self, kill: bool = False) -> None:
        self.killed = kill

    def _at(self, time_s: float, event: Event) -> None:
        heapq.heappush(self._events, (time_s, next(self._number), event))

    def _load(self, worker: _Worker, stage: Stage) -> float:
        seconds = 0.0
        if worker.model != stage.model:
            worker.model, worker.variant = stage.model, None
            self.model_loads += 1
            seconds += self._load_model_s
        variant = stage.inputs.get("quantize")
        if variant is not None and worker.variant != variant:
            worker.variant = variant
            seconds += self._load_variant_s
        return seconds


class StopAfter(StopRequest):
    """Asks to stop once the executor's clock has passed a time, and to end now after another."""

    def __init__(self, executor: VirtualExecutor, requested_s: float, killed_s: float = float("inf")) -> None:
        super().__init__()
        self._executor, self._requested_s, self._killed_s = executor, requested_s, killed_s

    @property
    def requested(self) -> bool:
        return self._executor.now >= self._requested_s

    @property
    def killed(self) -> bool:
        return self._executor.now >= self._killed_s


Run = tuple[dict[str, Status], VirtualHooks, VirtualExecutor]
OK, FAILED, BLOCKED, CANCELLED = Status.SUCCEEDED, Status.FAILED, Status.DEP_FAILED, Status.CANCELLED


def run(
    stages: dict[str, Stage],
    verdict: Callable[[str, int], Verdict] = lambda key, attempt: None,
    *,
    slots: int = 2,
    policy: Policy | None = None,
    done: tuple[str, ...] = (),
    hooks: VirtualHooks | None = None,
    executor: VirtualExecutor | None = None,
    stop: StopRequest | None = None,
) -> Run:
    hooks = hooks or VirtualHooks(stages)
    executor = executor or VirtualExecutor(slots, stages | hooks.makers, verdict)
    scheduler = Scheduler(executor.slots, policy or Policy(), hooks.status, clock=executor.clock, random=Random(0))
    scheduler.add(stages, done)
    drive(scheduler, executor, hooks, stop or StopRequest())
    return scheduler.statuses, hooks, executor
