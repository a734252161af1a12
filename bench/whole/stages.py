"""A stage of a sweep without a sweep, committed as a store commits it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.whole.shapes import TEXT
from orchestrator.store import write_json
from quant.methods.registry import ROUNDINGS
from quant.scheme import Granularity, WeightScheme
from workers.artifact import PAYLOAD, RECORD, payload_files, rename_flushed
from workers.request import Hints, Input, Location, Outcome, Request, StageRequest
from workers.run_stage import RUNNERS, Runners, run_request
from workers.specs import CalibrationSpec, Component, MethodSpec, ModelSpec, QuantizeSpec, Rule, Spec, StageKind, TextSpec, to_json


def grouped(bits: int) -> WeightScheme:
    return WeightScheme(bits, granularity=Granularity.GROUP, group_size=128)


SCHEMES = {"billm": WeightScheme(1), "claq": WeightScheme(2)}
"""Method ▸ the scheme where 4 bits in groups of 128 is not what it is for."""


WRITTEN = ("staging", "objects")
"""Folders of a store that artifacts are in."""


@dataclass(frozen=True)
class Made:
    folder: Path
    """The committed artifact."""
    record: dict[str, Any]
    stage_s: float
    commit_s: float

    @property
    def seconds(self) -> float:
        return self.stage_s + self.commit_s


def text_of(model: Path) -> Location:
    return Location("file", str(model / TEXT))


def spec_of(
    method: str, samples: int, length: int, params: dict[str, Any], propagation: str = "quantized", weight: WeightScheme | None = None
) -> QuantizeSpec:
    """weight: the method's own of `SCHEMES` when left out."""
    component = Component(method, ROUNDINGS[method].version, tuple(sorted(params.items())))
    scheme = weight or SCHEMES.get(method, grouped(4))
    feeds = propagation == "quantized" and bool(ROUNDINGS[method].needs)
    return QuantizeSpec(
        ModelSpec("model", "bfloat16"),
        (Rule("*", MethodSpec(component, propagation="quantized" if feeds else "original"), scheme),),
        CalibrationSpec(TextSpec("text", field="text"), samples, length) if feeds else None,
    )


def quantize(spec: QuantizeSpec, model: Path, store: Path, hints: Hints, runners: Runners = RUNNERS) -> Made:
    """From the files of `model` to a renamed, flushed artifact in `store`. Raises RuntimeError for a failed stage."""
    return committed(StageKind.QUANTIZE, spec, {}, model, {"text": text_of(model)}, store, hints, runners)


def committed(
    kind: StageKind,
    spec: Spec,
    inputs: dict[str, Path],
    model: Path,
    texts: dict[str, Location],
    store: Path,
    hints: Hints,
    runners: Runners = RUNNERS,
) -> Made:
    """inputs: role ▸ artifact; texts: digest ▸ location."""
    key = f"{time.time_ns():064x}"
    staging, final = (store / folder / key for folder in WRITTEN)
    (staging / PAYLOAD).mkdir(parents=True)
    request = Request(
        id="bench",
        stages=(StageRequest(key, kind.value, to_json(spec), {n: Input(p.name, str(p)) for n, p in inputs.items()}, str(staging)),),
        models={spec.model.digest: Location("folder", str(model))},
        texts=texts,
        hints=hints,
    )
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    run_request(request, outcomes.append, runners=runners)
    made = time.perf_counter()
    outcome = outcomes[0]
    if outcome.failure is not None or outcome.record is None:
        raise RuntimeError(f"{outcome.failure and outcome.failure.message}\n{outcome.failure and outcome.failure.log_tail}")
    record = {**outcome.record, "files": payload_files(staging)}
    write_json(staging / RECORD, record)
    final.parent.mkdir(exist_ok=True)
    rename_flushed(staging, final)
    return Made(final, record, made - began, time.perf_counter() - made)
