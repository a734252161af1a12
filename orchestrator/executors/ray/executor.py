"""Requests on Ray: one warm actor per slot.

Actors have no Ray retries and no restarts: the scheduler decides what runs again, so a death must reach it. A dead worker is
reported with its request and replaced at once; one that cannot be replaced within the start-up time loses its slot.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ClusterError
from orchestrator.executors.base import Event, RequestEnded, Runner, SlotLost, StageEnded
from orchestrator.executors.ray.actor import Batch, Identity, Worker
from orchestrator.executors.ray.capacity import Layout, NodeResources, layout
from orchestrator.executors.ray.head import Head
from orchestrator.executors.ray.start import POLL_S, Session, open_session
from orchestrator.executors.settings import ClusterSettings
from workers.request import FORMAT, Outcome, Request

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass
class _Slot:
    actor: Any
    identity: Any
    """Reference to `Worker.identify`, until it answered."""
    since: float
    """When its first worker that has not answered yet was asked for."""
    request: str | None = None
    call: Any = None
    """Reference to the `run` or `more` under way."""


class RayExecutor:
    """`runner`: instead of the real stages, for tests; workers must be able to import it."""

    def __init__(self, settings: ClusterSettings, runner: Runner | None = None) -> None:
        self._settings = settings
        self._runner = runner
        self._session: Session | None = None
        self._head: Head | None = None
        self._layout = Layout(0, 1, 0.0)
        self._slots: dict[int, _Slot] = {}

    @property
    def slots(self) -> int:
        return len(self._slots)

    def start(self) -> None:
        if self._session is not None:
            return
        self._session = open_session(self._settings, self._local_cores())
        try:
            self._head = Head(_head_address(), own=self._session.folder is not None)
            self._layout = layout(self._settings, _awaited_nodes(self._settings))
            starting = {i: self._spawn() for i in range(self._layout.slots)}
            self._slots = self._answered(starting)
        except BaseException:
            self.stop(kill=True)
            raise

    def submit(self, slot: int, request: Request) -> None:
        state = self._slots[slot]
        state.request = request.id
        state.call = state.actor.run.remote(request.to_json())

    def poll(self, timeout_s: float) -> list[Event]:
        import ray

        if not self._head_is_there():
            time.sleep(timeout_s)  # nothing is asked of Ray meanwhile
            return []
        calls = {s.call: i for i, s in self._slots.items() if s.call is not None}
        starts = {s.identity: i for i, s in self._slots.items() if s.identity is not None}
        waiting = [*calls, *starts]
        if not waiting:
            time.sleep(timeout_s)
            return []
        ready, rest = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        events: list[Event] = []
        for reference in ready:
            if reference in starts:
                self._worker_answered(self._slots[starts[reference]])
        for reference in ready:
            if reference in calls:
                events += self._call_returned(calls[reference])
        return events + self._lost_slots()

    def recycle(self, slot: int) -> None:
        import ray

        ray.kill(self._slots[slot].actor)
        self._slots[slot] = self._spawn()

    def stop(self, kill: bool = False) -> None:
        import ray

        if self._session is None:
            return
        if not kill:
            while any(s.call is not None for s in self._slots.values()):
                self.poll(1.0)
        if ray.is_initialized():
            for state in self._slots.values():
                ray.kill(state.actor)
        self._slots = {}
        session, self._session = self._session, None
        session.close()

    # -- workers ----------------------------------------------------------------------------------------------------------

    def _spawn(self) -> _Slot:
        import ray

        assert self._session is not None
        options: dict[str, Any] = {
            "num_cpus": self._layout.cpus_per_worker,
            "num_gpus": self._layout.gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if self._session.env:
            # Read by arithmetic libraries when torch is imported.
            threads = dict.fromkeys(THREAD_VARIABLES, str(self._layout.cpus_per_worker))
            options |= {"runtime_env": {"env_vars": {**self._session.env, **threads}}, "scheduling_strategy": "SPREAD"}
        actor: Any = ray.remote(Worker).options(**options).remote(self._layout.cpus_per_worker, self._runner)
        return _Slot(actor, actor.identify.remote(), time.monotonic())

    def _answered(self, starting: dict[int, _Slot]) -> dict[int, _Slot]:
        """The workers that started in time, renumbered; the others are given up. Raises ClusterError when none did."""
        import ray

        references = {s.identity: s for s in starting.values()}
        ready, late = ray.wait(list(references), num_returns=len(references), timeout=self._settings.startup_timeout_s)
        answered = []
        reason = f"no answer within cluster.startup_timeout_s={self._settings.startup_timeout_s:g}; are its cores or GPUs in use?"
        for reference in ready:
            try:
                _check_version(ray.get(reference))
                answered.append(references[reference])
            except ray.exceptions.RayError as e:
                reason = _first_line(e)
        for reference in late:
            ray.kill(references[reference].actor)
        if not answered:
            raise ClusterError(
                f"no worker started: {reason}; every node needs bitgrid and its dependencies for the same Python, or use cluster=in_process"
            )
        for state in answered:
            state.identity = None
            state.actor.warm.remote()
        return dict(enumerate(sorted(answered, key=list(starting.values()).index)))

    def _worker_answered(self, state: _Slot) -> None:
        """A replacement is there, or died before it was: then another one is asked for."""
        import ray

        try:
            ray.get(state.identity)
            state.identity = None
        except ray.exceptions.RayError:
            if not self._head_is_there(look=True):
                return  # asked again later
            again = self._spawn()
            state.actor, state.identity = again.actor, again.identity

    def _call_returned(self, slot: int) -> list[Event]:
        import ray

        state = self._slots[slot]
        request = state.request
        assert request is not None
        try:
            batch: Batch = ray.get(state.call)
        except ray.exceptions.RayError as e:
            if not self._head_is_there(look=True):
                return []  # the call stays, and is lost still when the head is back
            return [self._replace(slot, request, _why_lost(e))]
        state.call = None
        events: list[Event] = [StageEnded(request, slot, Outcome.from_json(o)) for o in batch.outcomes]
        if batch.error is not None:
            events.append(self._replace(slot, request, batch.error))
        elif batch.ended:
            state.request = None
            events.append(RequestEnded(request, slot))
        else:
            state.call = state.actor.more.remote()
        return events

    def _replace(self, slot: int, request: str, reason: str) -> RequestEnded:
        self.recycle(slot)
        return RequestEnded(request, slot, reason)

    def _head_is_there(self, look: bool = False) -> bool:
        return self._head is None or self._head.is_there(look)

    def _lost_slots(self) -> list[Event]:
        """Slots whose new worker does not come: their node is gone, or its resources are."""
        import ray

        timeout_s = self._settings.startup_timeout_s
        late = [i for i, s in self._slots.items() if s.identity is not None and time.monotonic() - s.since > timeout_s]
        events: list[Event] = []
        for slot in late:
            state = self._slots.pop(slot)
            ray.kill(state.actor)
            events.append(SlotLost(slot, f"no new worker within cluster.startup_timeout_s={timeout_s:g}", state.request))
        return events

    # -- resources --------------------------------------------------------------------------------------------------------

    def _local_cores(self) -> int:
        """Cores of a cluster started here: this machine's, or as many as were asked for."""
        return max(_cores(), (self._settings.slots or 1) * (self._settings.threads or 1))


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _awaited_nodes(settings: ClusterSettings) -> list[NodeResources]:
    """The cluster's, once it has as many as are waited for. Raises ClusterError."""
    until = time.monotonic() + settings.startup_timeout_s
    while len(nodes := _nodes()) < (settings.nodes or 0):
        if time.monotonic() > until:
            raise ClusterError(
                f"the cluster has {len(nodes)} of cluster.nodes={settings.nodes} nodes after cluster.startup_timeout_s="
                f"{settings.startup_timeout_s:g}; run `ray start --address=…` on the others, or lower cluster.nodes"
            )
        time.sleep(POLL_S)
    return nodes


def _nodes() -> list[NodeResources]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    alive = [n["Resources"] for n in nodes if n["Alive"]]
    return [NodeResources(r.get("CPU", 0), r.get("GPU", 0), r.get("memory", 0)) for r in alive]


def _head_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _check_version(identity: Identity) -> None:
    if identity.request_format != FORMAT:
        raise ClusterError(
            f"the worker on {identity.host} speaks request format {identity.request_format}, this driver {FORMAT}; "
            "install the same bitgrid on every node"
        )


def _why_lost(error: Exception) -> str:
    """In our own words: Ray's text for any death lists running out of memory among the guesses."""
    import ray

    if isinstance(error, ray.exceptions.OutOfMemoryError) or "low on memory" in str(error):
        return "out of memory: the node's memory monitor ended the worker"
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "the worker process died (killed, or crashed in native code)"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "the worker cannot be reached (its node went down, or the network to it)"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The last line of a remote traceback is the exception itself.
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"
