"""The state of a running plan: which stages are done, ready, running or waiting, and what starts next.

A pure state machine: no threads, no clock of its own, no Ray, no store. `orchestrator.schedule` feeds it events and carries
out what it decides. Stages may be added while it runs.

    add ▸ PENDING ──assign──▸ RUNNING ──succeeded──▸ SUCCEEDED
             ▲                   │ ├──fail──▸ FAILED ▸ all that depends on it: DEP_FAILED
             └──retry, recompute─┘ └──cancel──▸ CANCELLED

Invariants: a stage starts only after all its inputs succeeded; every stage ends in exactly one final status, except that a
success whose artifact turns out corrupt goes back to PENDING (`recompute`).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from random import Random

from orchestrator.graph import Graph, Node
from orchestrator.placement import Holdings, ReadyQueue
from orchestrator.retries import LOST_WORKER, Adjustment, Policy, Retry, decide
from orchestrator.stage import Stage, Status
from workers.request import Failure

Listener = Callable[[Stage, Status, "str | None"], None]
"""Called at every change with the stage, its new status and, for DEP_FAILED, the key of the failed stage."""


@dataclass(frozen=True)
class Assignment:
    """Stages to run as one request."""

    request_id: str
    slot: int
    stages: tuple[Stage, ...]
    attempts: Mapping[str, int]
    """Key ▸ number of this attempt in this run, from 1."""
    adjustment: Adjustment

    @property
    def exclusive(self) -> bool:
        return self.adjustment.exclusive or any(s.exclusive for s in self.stages)


class Scheduler:
    """See the module. `changed` hears every transition; `clock` and `random` are for tests."""

    def __init__(
        self,
        slots: int,
        policy: Policy,
        changed: Listener,
        *,
        variants_per_slot: int = 1,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self._policy = policy
        self._changed = changed
        self._clock = clock
        self._random = random or Random()
        self._holdings = Holdings(slots, variants_per_slot)
        self._graph = Graph()
        self._ready = ReadyQueue()
        self._exclusive: list[str] = []
        """Ready stages that must run alone, what is timed or has used too much memory: they wait until nothing else is ready or runs."""
        self._backoff: list[tuple[float, str]] = []
        """Heap of (time, key)."""
        self._running: dict[str, Assignment] = {}
        self._unfinished = 0
        self._work_left_s = 0.0
        self._requests = 0
        self._events = 0
        self._stopping = False

    # -- what it tells ------------------------------------------------------------------------------------------------

    @property
    def statuses(self) -> dict[str, Status]:
        return {key: node.status for key, node in self._graph.nodes.items()}

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def running(self) -> Mapping[str, Assignment]:
        """Requests under way, by id."""
        return self._running

    @property
    def slots(self) -> Collection[int]:
        return self._holdings.slots

    def stage(self, key: str) -> Stage:
        return self._graph.nodes[key].stage

    def attempt(self, key: str) -> int:
        return self._graph.nodes[key].tries.attempt

    def next_wait_s(self) -> float | None:
        """Seconds until the first backoff ends; `None` without one."""
        return max(0.0, self._backoff[0][0] - self._clock()) if self._backoff else None

    # -- starting -----------------------------------------------------------------------------------------------------

    def add(self, stages: Mapping[str, Stage], done: Collection[str] = ()) -> None:
        """Take on further stages. `done`: keys of inputs that exist already. A known key is left as it is.

        Raises ValueError for an input that is neither known, added nor done, and for a cycle.
        """
        nodes = self._graph.add(stages, done)
        for node in nodes:
            self._unfinished += 1
            self._work_left_s += node.stage.resources.seconds
            self._changed(node.stage, Status.PENDING, None)
        for key in self._ready:
            self._enqueue(self._graph.nodes[key])  # by its new rank
        for node in nodes:
            if node.status is Status.PENDING and self._can_run(node):
                self._enqueue(node)

    def assign(self) -> list[Assignment]:
        """What to start now on the free slots; these stages are RUNNING from here on."""
        while self._backoff and self._backoff[0][0] <= self._clock():
            self._enqueue(self._graph.nodes[heapq.heappop(self._backoff)[1]])
        if any(a.exclusive for a in self._running.values()):
            return []
        free = set(self.slots) - {a.slot for a in self._running.values()}
        started = []
        while (choice := self._holdings.choose(free, self._ready, self._time_left_s(), self._policy.slack)) is not None:
            slot, key = choice
            free.remove(slot)
            started.append(self._start(slot, self._companions(key)))
        if not self._running and self._exclusive and free:
            started.append(self._start(min(free), [self._graph.nodes[self._exclusive.pop(0)]]))
        return started

    # -- what became of a stage -----------------------------------------------------------------------------------------

    def succeeded(self, key: str) -> None:
        node = self._graph.nodes[key]
        node.succeeded = self._event()
        self._finish(node, Status.SUCCEEDED)
        for name in node.dependants:
            dependant = self._graph.nodes[name]
            dependant.missing.discard(key)
            if dependant.status is Status.PENDING:
                self._enqueue(dependant)

    def reaction(self, key: str, failure: Failure) -> Retry | None:
        """How a failed attempt is followed by another, if at all. Carry it out with `retry`, or with `fail`."""
        tries = self._graph.nodes[key].tries
        if failure.type == LOST_WORKER:
            tries.losses += 1
        return decide(tries, failure, self._policy, len(self.slots), self._random)

    def retry(self, key: str, retry: Retry) -> None:
        """Start it again after `retry.delay_s`; while stopping, cancel it instead: the next run will."""
        node = self._graph.nodes[key]
        node.tries.adjustment = retry.adjustment
        node.tries.retries += retry.counted
        if self._can_run(node):
            self._set(node, Status.PENDING)
            heapq.heappush(self._backoff, (self._clock() + retry.delay_s, key))

    def requeue(self, key: str) -> None:
        """Start it again at once: it did not fail itself."""
        node = self._graph.nodes[key]
        if self._can_run(node):
            self._set(node, Status.PENDING)
            self._enqueue(node)

    def fail(self, key: str) -> None:
        self._end_with_dependants(self._graph.nodes[key], Status.FAILED, key)

    def cancel(self, key: str) -> None:
        self._end_with_dependants(self._graph.nodes[key], Status.CANCELLED, None)

    def request_ended(self, request_id: str) -> list[Stage]:
        """Free its slot; returns the stages without an outcome, still RUNNING, to be retried, requeued or failed."""
        stages = self._running.pop(request_id).stages
        return [s for s in stages if self._graph.nodes[s.key].request_id == request_id]

    # -- corrupt artifacts ------------------------------------------------------------------------------------------------

    def recomputed_since(self, producer: str, dependant: str) -> bool:
        """Whether `producer` runs again, or did since `dependant` started: the corruption it met is known already."""
        node = self._graph.nodes.get(producer)
        return node is not None and (not node.status.finished or node.succeeded > self._graph.nodes[dependant].started)

    def may_recompute(self, dependant: str) -> bool:
        return self._graph.nodes[dependant].tries.recomputed < self._policy.max_retries

    def recompute(self, producer: Stage, dependant: str) -> None:
        """Run `producer`, whose artifact was corrupt, again before `dependant`; inputs of it that are unknown count as done."""
        self._graph.nodes[dependant].tries.recomputed += 1
        node = self._graph.nodes.get(producer.key) or self._graph.add_finished(producer)
        if node.status.finished:
            self._unfinished += 1
            self._work_left_s += producer.resources.seconds
            self._set(node, Status.PENDING)
            for other in self._graph.expect(node):
                self._unqueue(other)  # until it is there again
            if self._can_run(node):
                self._enqueue(node)
        self.requeue(dependant)

    # -- slots and stopping ---------------------------------------------------------------------------------------------

    def slot_reset(self, slot: int) -> None:
        """The slot has a new worker, which holds nothing."""
        self._holdings.reset(slot)

    def slot_lost(self, slot: int) -> None:
        self._holdings.remove(slot)

    def cancel_pending(self) -> None:
        """Start nothing more: what does not run is CANCELLED, and so is what would be retried or is added later."""
        self._stopping = True
        for node in self._graph.nodes.values():
            if node.status is Status.PENDING:
                self._unqueue(node)
                self._finish(node, Status.CANCELLED)

    def cancel_all(self) -> None:
        """As `cancel_pending`, running stages included."""
        self.cancel_pending()
        self._running.clear()
        for node in self._graph.nodes.values():
            if node.status is Status.RUNNING:
                self._finish(node, Status.CANCELLED)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _event(self) -> int:
        self._events += 1
        return self._events

    def _time_left_s(self) -> float:
        """A lower bound: the longest chain, or the work left spread over the slots."""
        chains = [self._graph.nodes[s.key].rank_s for a in self._running.values() for s in a.stages]
        if (urgent := self._ready.most_urgent()) is not None:
            chains.append(-urgent[1].negative_rank_s)
        return max([*chains, self._work_left_s / max(1, len(self.slots))])

    def _companions(self, key: str) -> list[Node]:
        """The stage and those that share its request: ready, of the same share group, and none with a failed attempt.

        A stage with one runs by itself, so that what it does to its worker hits no other.
        """
        node = self._graph.nodes[key]
        if node.stage.share_group is None or node.tries.attempt:
            return [node]
        others = (self._graph.nodes[turn.key] for turn in self._ready.groups[node.stage.affinity].by_order)
        return [n for n in others if n.stage.share_group == node.stage.share_group and not n.tries.attempt]

    def _start(self, slot: int, nodes: list[Node]) -> Assignment:
        self._requests += 1
        request_id = f"r{self._requests}"
        for node in nodes:
            self._unqueue(node)
            node.tries.attempt += 1
            node.started = self._event()
            self._set(node, Status.RUNNING)
            node.request_id = request_id
            self._holdings.ran(slot, node.stage)
        attempts = {n.stage.key: n.tries.attempt for n in nodes}
        assignment = Assignment(request_id, slot, tuple(n.stage for n in nodes), attempts, nodes[0].tries.adjustment)
        self._running[request_id] = assignment
        return assignment

    def _can_run(self, node: Node) -> bool:
        """False, and ended, when nothing starts any more or an input of it will not come."""
        dead = self._graph.dead_input(node)
        if dead is not None and dead.status is not Status.CANCELLED:
            self._end_with_dependants(node, Status.DEP_FAILED, dead.blocked_by or dead.stage.key)
        elif dead is not None or self._stopping:
            self._end_with_dependants(node, Status.CANCELLED, None)
        return not node.status.finished

    def _enqueue(self, node: Node) -> None:
        self._unqueue(node)
        if node.missing or node.status is not Status.PENDING:
            return
        if node.stage.exclusive or node.tries.adjustment.exclusive:
            self._exclusive.append(node.stage.key)
        else:
            self._ready.add(node.stage, node.rank_s, node.order)

    def _unqueue(self, node: Node) -> None:
        key = node.stage.key
        self._ready.discard(key)
        self._exclusive = [k for k in self._exclusive if k != key]
        if any(k == key for _, k in self._backoff):
            self._backoff = [(t, k) for t, k in self._backoff if k != key]
            heapq.heapify(self._backoff)

    def _set(self, node: Node, status: Status, blocked_by: str | None = None) -> None:
        node.status, node.blocked_by, node.request_id = status, blocked_by, None
        self._changed(node.stage, status, blocked_by)

    def _finish(self, node: Node, status: Status, blocked_by: str | None = None) -> None:
        self._unfinished -= 1
        self._work_left_s -= node.stage.resources.seconds
        self._set(node, status, blocked_by)

    def _end_with_dependants(self, node: Node, status: Status, blocker: str | None) -> None:
        """End a stage, and with it all that waits for it: DEP_FAILED below a failure, else CANCELLED."""
        below = self._graph.waiting_below(node)
        self._finish(node, status, blocker if status is Status.DEP_FAILED else None)
        for other in below:
            self._unqueue(other)
            self._finish(other, Status.DEP_FAILED if blocker else Status.CANCELLED, blocker)
