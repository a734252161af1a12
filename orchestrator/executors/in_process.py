"""One slot in this process: requests run on a thread, so that the driver can go on listening.

No isolation: what kills the process kills the sweep, and `stop(kill=True)` cannot end a stage under way, only leave its thread
behind. Between stages a request can be stopped.
"""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from orchestrator.errors import ClusterError
from orchestrator.executors.base import Event, RequestEnded, Runner, StageEnded
from workers.request import Outcome, Request


def stage_runner() -> Runner:
    """`workers.run_stage.run_request`. Raises ClusterError where what it needs is not installed."""
    try:
        return cast(Runner, importlib.import_module("workers.run_stage").run_request)
    except ImportError as e:
        raise ClusterError(f"stages cannot run in this process: {e}; install bitgrid with its dependencies") from e


class RequestThread:
    """Runs requests one at a time, always on the same thread: arithmetic libraries keep a thread pool per calling thread."""

    def __init__(self, runner: Runner, threads: int | None) -> None:
        self._runner = runner
        self._threads = threads
        self._requests: queue.SimpleQueue[tuple[Request, Callable[[Outcome | None, str | None], None]] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stages", daemon=True)
        self._thread.start()

    def submit(self, request: Request, report: Callable[[Outcome | None, str | None], None]) -> None:
        """`report(outcome, None)` is called for every stage, then `report(None, error)`; `error` is normally `None`."""
        if request.hints.threads is None:
            request = replace(request, hints=replace(request.hints, threads=self._threads))
        self._requests.put((request, report))

    def stop(self) -> None:
        """Start no further stage."""
        self._stopped.set()
        self._requests.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (item := self._requests.get()) is not None:
            request, report = item
            error: str | None = None
            try:
                self._runner(request, lambda outcome, report=report: report(outcome, None), self._stopped.is_set)  # type: ignore[misc]
            except BaseException as e:  # a thread has nobody above it to raise to
                error = f"{type(e).__name__}: {e}"
            report(None, error)


class InProcessExecutor:
    """`runner`: what runs a request; `None` is the real one, imported at `start`. `threads`: of a stage; `None` is torch's choice."""

    def __init__(self, threads: int | None = None, runner: Runner | None = None) -> None:
        self._threads = threads
        self._runner = runner
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._worker: RequestThread | None = None

    @property
    def slots(self) -> int:
        return 1

    def start(self) -> None:
        if self._worker is None:
            self._worker = RequestThread(self._runner or stage_runner(), self._threads)

    def submit(self, slot: int, request: Request) -> None:
        if self._worker is None:
            raise RuntimeError("submit before start")

        def report(outcome: Outcome | None, error: str | None) -> None:
            self._events.put(RequestEnded(request.id, slot, error) if outcome is None else StageEnded(request.id, slot, outcome))

        self._worker.submit(request, report)

    def poll(self, timeout_s: float) -> list[Event]:
        try:
            events = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def recycle(self, slot: int) -> None:
        """Nothing to replace: a CUDA error in this process stays until it ends."""

    def stop(self, kill: bool = False) -> None:
        if self._worker is not None:
            self._worker.stop()
            if not kill:
                self._worker.join()
            self._worker = None
