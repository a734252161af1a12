"""A runner for sweeps whose stages need no model: apart from `fake_runner`, which every Ray worker of the tests imports."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import run
from orchestrator.executors.in_process import InProcessExecutor
from workers.request import ErrorClass, Failure, Outcome, Request, StageRequest

Meddle = Callable[[StageRequest], "Failure | None"]


def small_stage(request: Request, on_outcome: Callable[[Outcome], None], should_stop: Callable[[], bool]) -> None:
    """Stages that read and compute nothing; scores follow from the key, so that the same stage gives the same result."""
    for stage in request.stages:
        if should_stop():
            return
        started, payload = time.time(), Path(stage.staging) / "payload"
        draws = random.Random(stage.key)
        summary: dict[str, Any] = {"bits_nominal": 4, "bits_stored": 4.5, "model_bytes": 1000}
        if stage.kind == "evaluate":
            nll = [1 + draws.random() for _ in range(20)]
            items = {"id": [str(i) for i in range(20)], "weight": [1.0] * 20, "nll": nll}
            pq.write_table(pa.table(items), payload / "items.parquet")
            summary = {"scores": {"ppl": math.exp(sum(nll) / 20)}}
        else:
            (payload / "values.txt").write_text(str(draws.random()))
        on_outcome(Outcome(stage.key, record={"started": started, "ended": time.time(), "notes": [], "summary": summary}))


def meddle(monkeypatch: pytest.MonkeyPatch, act: Meddle) -> None:
    """`act` is called before each stage and may fail it."""

    def runner(request: Request, on_outcome: Callable[[Outcome], None], should_stop: Callable[[], bool]) -> None:
        failures = {s.key: f for s in request.stages if (f := act(s)) is not None}
        for key, failure in failures.items():
            on_outcome(Outcome(key, failure=failure))
        left = tuple(s for s in request.stages if s.key not in failures)
        if left:
            small_stage(Request(request.id, left, request.models, request.texts, request.hints), on_outcome, should_stop)

    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=runner))


def is_gptq(stage: StageRequest) -> bool:
    return stage.kind == "quantize" and stage.spec["rules"][0]["method"]["rounding"]["name"] == "gptq"


def gptq_fails(stage: StageRequest) -> Failure | None:
    return Failure(ErrorClass.NUMERICAL, "FakeError", "the Hessian is not positive definite") if is_gptq(stage) else None
