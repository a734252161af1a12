"""The executor protocol: submit requests to numbered slots, take events back.

An executor knows nothing of plans, keys or the store. It runs `workers.run_stage.run_request` somewhere and reports each
stage's outcome as it ends. It never retries: the scheduler does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from workers.request import Outcome, Request


@dataclass(frozen=True)
class StageEnded:
    """One stage of a request ended; others of it may still run."""

    request_id: str
    slot: int
    outcome: Outcome


@dataclass(frozen=True)
class RequestEnded:
    """The slot is free again. Stages without an outcome are to be requeued."""

    request_id: str
    slot: int
    worker_lost: str | None = None
    """Why, when the worker died (the slot has, or gets, a new one that holds nothing)."""


@dataclass(frozen=True)
class SlotLost:
    """The slot's worker is gone and cannot be replaced (its node left the cluster): the slot is never used again."""

    slot: int
    reason: str
    request_id: str | None = None
    """A request that was on it: its stages are to be requeued, without blame."""


Event = StageEnded | RequestEnded | SlotLost

Runner = Callable[[Request, Callable[[Outcome], None], Callable[[], bool]], None]
"""`run(request, on_outcome, should_stop)`: `workers.run_stage.run_request`, or a fake."""


class Executor(Protocol):
    @property
    def slots(self) -> int:
        """Requests that can run at once; known after `start`."""

    def start(self) -> None:
        """Idempotent. Raises ClusterError. Called only when there is something to run."""

    def submit(self, slot: int, request: Request) -> None:
        """Start a request on a free slot; returns at once (the in-process executor runs it on a thread)."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Events since the last call; waits up to `timeout_s` for the first. Raises ClusterError where the cluster is lost."""

    def recycle(self, slot: int) -> None:
        """Replace the worker of a free slot (after a CUDA error)."""

    def stop(self, kill: bool = False) -> None:
        """Release everything this executor started, and nothing else. `kill`: without waiting for running stages."""
