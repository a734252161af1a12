"""One slot in this process: requests run on a thread, so that the driver can go on listening.

No isolation: what kills the process kills the sweep, and `stop(kill=True)` cannot end a stage under way, only leave its thread
behind. Between stages a request can be cancelled.
"""

from __future__ import annotations

import importlib
import queue
import threading
from typing import cast

from orchestrator.errors import ClusterError
from orchestrator.executors.base import Event, RequestEnded, Runner, StageEnded
from workers.request import Request


def stage_runner() -> Runner:
    """`workers.run_stage.run_request`. Raises ClusterError where its packages are not installed."""
    try:
        return cast(Runner, importlib.import_module("workers.run_stage").run_request)
    except ImportError as e:
        raise ClusterError(f"stages cannot run in this process: {e}; install bitgrid with its dependencies") from e


class InProcessExecutor:
    """`runner`: what runs a request; `None` is the real one, imported at `start`."""

    def __init__(self, runner: Runner | None = None) -> None:
        self._runner = runner
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()

    @property
    def slots(self) -> int:
        return 1

    def start(self) -> None:
        self._runner = self._runner or stage_runner()
        self._cancelled.clear()

    def submit(self, slot: int, request: Request) -> None:
        if self._runner is None:
            raise RuntimeError("submit before start")
        self._thread = threading.Thread(target=self._run, args=(self._runner, slot, request), name="stages", daemon=True)
        self._thread.start()

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
        self._cancelled.set()
        if self._thread is not None and not kill:
            self._thread.join()

    def _run(self, runner: Runner, slot: int, request: Request) -> None:
        lost: str | None = None
        try:
            for outcome in runner(request):
                self._events.put(StageEnded(request.id, slot, outcome))
                if self._cancelled.is_set():
                    break
        except BaseException as e:  # a thread has nobody above it to raise to
            lost = f"{type(e).__name__}: {e}"
        self._events.put(RequestEnded(request.id, slot, lost))
