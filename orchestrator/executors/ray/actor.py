"""The worker actor: one process, one slot, models kept warm between requests. Imports neither ray nor torch at the top."""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from orchestrator.executors.base import Runner
from orchestrator.executors.in_process import RequestThread, stage_runner
from workers.request import FORMAT, Outcome, Request

HEAVY_MODULES = ("torch", "transformers", "workers.calibrate", "workers.quantize", "workers.evaluate")


@dataclass(frozen=True)
class Identity:
    """What a new worker says of itself."""

    request_format: int
    pid: int
    host: str
    python: str


@dataclass(frozen=True)
class Batch:
    """Outcomes since the last call."""

    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """`Outcome.to_json`."""
    ended: bool = False
    error: str | None = None
    """When the request ended by an exception that no stage accounts for."""


class Worker:
    """Runs requests on a thread; the driver fetches outcomes by calling `run`, then `more` until the request has ended.

    Fetching, rather than a stream from the worker, needs no more of Ray than a method call, so that a death of the process
    always shows as that call's error.
    """

    def __init__(self, threads: int | None, runner: Runner | None) -> None:
        # Ctrl-C on the driver's terminal is for the driver: running stages are to end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._threads = threads
        self._runner = runner
        self._requests: RequestThread | None = None
        self._reports: queue.SimpleQueue[tuple[Outcome | None, str | None]] = queue.SimpleQueue()

    def identify(self) -> Identity:
        return Identity(FORMAT, os.getpid(), socket.gethostname(), sys.version.split()[0])

    def warm(self) -> None:
        """Import what stages need, while there is nothing to do yet. A failure will show again where it matters: in a stage.

        Nobody waits for this call, and Ray prints the traceback of one that fails unheard.
        """
        if self._runner is None:
            with contextlib.suppress(Exception):
                for name in HEAVY_MODULES:
                    importlib.import_module(name)

    def run(self, request: dict[str, Any]) -> Batch:
        if self._requests is None:
            self._requests = RequestThread(self._runner or stage_runner(), self._threads)
        self._requests.submit(Request.from_json(request), lambda outcome, error: self._reports.put((outcome, error)))
        return self.more()

    def more(self) -> Batch:
        """Waits for the next outcome, or the end of the request."""
        reports = [self._reports.get()]
        while not self._reports.empty():
            reports.append(self._reports.get())
        outcomes = [outcome.to_json() for outcome, _ in reports if outcome is not None]
        end = next(((True, error) for outcome, error in reports if outcome is None), (False, None))
        return Batch(outcomes, *end)
