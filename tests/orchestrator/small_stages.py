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

from workers.request import Outcome, Request


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
