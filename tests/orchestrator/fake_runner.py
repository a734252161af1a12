"""Stages for executor tests: each does what its spec says. Importable by worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.request import ErrorClass, Failure, Hints, Outcome, Request, StageRequest


def run_fake(request: Request, on_outcome: Callable[[Outcome], None], should_stop: Callable[[], bool]) -> None:
    for stage in request.stages:
        if should_stop():
            return
        on_outcome(_run(stage, request))


def _run(stage: StageRequest, request: Request) -> Outcome:
    does = stage.spec
    if does.get("fail"):
        return Outcome(stage.key, failure=Failure(ErrorClass.NUMERICAL, "FakeError", does["fail"]))
    if does.get("raise"):
        raise RuntimeError(does["raise"])
    if does.get("exit") and not (does.get("unless") and Path(does["unless"]).exists()):
        if does.get("unless"):
            Path(does["unless"]).touch()
        os._exit(does["exit"])
    if does.get("started"):
        Path(does["started"]).write_text(str(os.getpid()))
    if does.get("wait_for"):
        while not Path(does["wait_for"]).exists():
            time.sleep(0.01)
    record = {"pid": os.getpid(), "threads": request.hints.threads, "omp": os.environ.get("OMP_NUM_THREADS"), "cwd": os.getcwd()}
    return Outcome(stage.key, record=record)


def fake_request(request_id: str, **stages: dict[str, Any]) -> Request:
    """Stages by key, each with what it does: fail, raise, exit (unless a file exists; makes it), started, wait_for."""
    wanted = tuple(StageRequest(key, "fake", does, {}, "") for key, does in stages.items())
    return Request(request_id, wanted, {}, {}, Hints())
