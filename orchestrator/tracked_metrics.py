"""Metrics of a variant's run: every number with the time at which its stage ended, so that a second write is the same write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchestrator.mlflow_names import metric_name
from orchestrator.results import StageResult, SweepResult, TaskInfo, VariantResult
from orchestrator.stage import Status
from orchestrator.stats import Delta
from workers.artifact import CorruptArtifactError, payload_path

GIB = 2**30
PROGRESS_POINTS = 200
"""About so many points of the progress series, whatever the size of the sweep."""


@dataclass(frozen=True)
class Point:
    name: str
    value: float
    timestamp_ms: int
    step: int = 0


DeltaOf = Callable[[StageResult, StageResult, TaskInfo, str], Delta]
"""Variant's and baseline's evaluation, task, metric ▸ paired difference. An exception is named in the run's notes, and the
plain difference logged without an interval."""
SIZES = {"bits_nominal": "size/bits_nominal", "bits_stored": "size/bits_stored", "model_bytes": "size/model_bytes"}
QUANTIZE_FACTS = {
    **SIZES,
    "peak_memory_bytes": "mem/quantize_peak_bytes",
    "weight_error": "err/weight_error",
    "output_error": "err/output_error",
}
"""Name in the summary of a stage ▸ metric."""
MEASURE_FACTS = {
    "decode_tokens_per_s": "perf/decode_tok_s",
    "decode_p50_s": "perf/decode_p50_s",
    "decode_p95_s": "perf/decode_p95_s",
    "prefill_tokens_per_s": "perf/prefill_tok_s",
    "prefill_p50_s": "perf/prefill_p50_s",
    "prefill_p95_s": "perf/prefill_p95_s",
    "weights_bytes": "mem/weights_bytes",
    "peak_memory_bytes": "mem/measure_peak_bytes",
    "peak_reserved_bytes": "mem/measure_reserved_bytes",
    "run_energy_j": "perf/run_energy_j",
    "token_energy_j": "perf/token_energy_j",
    "disk_bytes": "size/disk_bytes",
    "kv_bytes": "mem/kv_bytes",
}
LAYER_COLUMNS = ("weight_error", "output_error")


def scores(stage: StageResult) -> dict[str, float]:
    """Metrics of an evaluate stage; empty before it is committed."""
    found = stage.summary.get("scores")
    return _numbers(found) if isinstance(found, Mapping) else {}


def variant_points(
    variant: VariantResult,
    baseline: VariantResult | None,
    tasks: Mapping[str, TaskInfo],
    delta_of: DeltaOf,
    model_bytes: Mapping[str, int] = MappingProxyType({}),
) -> tuple[tuple[Point, ...], list[str]]:
    """All points, sorted, and notes about what could not be told: deltas without an interval, a table that cannot be read.

    model_bytes: of unquantized models, by digest, as in `SweepResult`."""
    points: list[Point] = []
    notes: list[str] = []
    if variant.quantize is not None:
        points, notes = _quantize_points(variant.quantize)
    if variant.evaluations:
        # Of one evaluation that is the same however far the sweep has come.
        first = variant.evaluations[min(variant.evaluations)]
        points += _cache_points(first)
        size = model_bytes.get(first.spec.get("model", {}).get("digest", ""))
        if variant.quantize is None and size is not None:
            points += _facts(first, SIZES, {"model_bytes": size})
    if variant.measure is not None:
        points += _facts(variant.measure, MEASURE_FACTS)
    for task, stage in variant.evaluations.items():
        if stage.record is None:
            continue
        at = ms(stage.record["ended"])
        points += [Point(metric_name("eval", task, m), v, at) for m, v in scores(stage).items()]
        points.append(Point(metric_name("time", f"evaluate_{task}_s"), _elapsed(stage), at))
        other = None if baseline is None or variant.is_baseline else baseline.evaluations.get(task)
        if other is not None and other.record is not None and task in tasks:
            made, said = _delta_points(stage, other, tasks[task], delta_of)
            points, notes = points + made, notes + said
    return tuple(sorted(points, key=lambda p: (p.name, p.step))), notes


def _facts(stage: StageResult, names: Mapping[str, str], told: Mapping[str, Any] | None = None) -> list[Point]:
    """told: facts by name; None: those of the stage's summary."""
    if stage.record is None:
        return []
    at, known = ms(stage.record["ended"]), _numbers(stage.summary if told is None else told)
    values = {metric: known[name] for name, metric in names.items() if name in known}
    if "size/model_bytes" in values:
        values["size/model_gib"] = values["size/model_bytes"] / GIB
    return [Point(n, v, at) for n, v in values.items()]


def _cache_points(stage: StageResult) -> list[Point]:
    """Bits per key and value, of an evaluation whose cache is quantized."""
    bits = _numbers(stage.summary.get("kv") or {}).get("bits_stored")
    return [] if stage.record is None or bits is None else [Point("size/kv_bits_stored", bits, ms(stage.record["ended"]))]


def _quantize_points(stage: StageResult) -> tuple[list[Point], list[str]]:
    if stage.record is None:
        return [], []
    at = ms(stage.record["ended"])
    points = [*_facts(stage, QUANTIZE_FACTS), Point("time/quantize_s", _elapsed(stage), at)]
    if stage.payload is None or "layers.parquet" not in stage.record.get("files", {}):
        return points, []
    try:
        series = _block_errors(str(stage.payload.parent))
    except CorruptArtifactError as e:
        return points, [f"no error per layer: {e}"]
    return points + [Point(f"layer/{column}", value, at, step=block) for column, block, value in series], []


@lru_cache(maxsize=4096)
def _block_errors(artifact: str) -> tuple[tuple[str, int, float], ...]:
    """(column, block, mean over the block's linears) of a quantize stage's table. The folder is named by its content key."""
    import pyarrow.parquet as pq

    rows = pq.read_table(payload_path(Path(artifact), "layers.parquet")).to_pylist()
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        for column in LAYER_COLUMNS:
            if row.get(column) is not None and row.get("block") is not None:
                found.setdefault((column, int(row["block"])), []).append(float(row[column]))
    return tuple((column, block, sum(v) / len(v)) for (column, block), v in sorted(found.items()))


def _delta_points(stage: StageResult, other: StageResult, task: TaskInfo, delta_of: DeltaOf) -> tuple[list[Point], list[str]]:
    assert stage.record is not None
    assert other.record is not None
    at = ms(max(stage.record["ended"], other.record["ended"]))
    base, points, notes = scores(other), [], []
    for metric, value in scores(stage).items():
        if metric not in base or metric not in task.higher_is_better:
            continue
        try:
            found: Delta | None = delta_of(stage, other, task, metric)
        except Exception as e:  # the score is still worth showing; the run says why it has no interval
            found = None
            notes.append(f"delta of {task.name}/{metric} has no interval: {e}")
        name = metric_name("delta", task.name, metric)
        points.append(Point(name, value - base[metric] if found is None else found.delta, at))
        if found is not None and not (math.isnan(found.low) or math.isnan(found.high)):
            points += [Point(f"{name}_low", found.low, at), Point(f"{name}_high", found.high, at)]
    return points, notes


def progress(result: SweepResult) -> tuple[Point, ...]:
    """Stages done over time: reused ones count from the start. The stride depends on the plan alone, so that a resumed sweep
    only adds points."""
    done = [s for s in result.stages.values() if s.status in (Status.SUCCEEDED, Status.CACHED)]
    taken = sum(result.reused(s) for s in done)
    times = sorted(t for s in done if not result.reused(s) and (t := s.ended) is not None)
    stride = max(1, len(result.stages) // PROGRESS_POINTS)
    points = [Point("progress/stages_done", float(taken), ms(result.created), taken)] if taken else []
    for count, ended in enumerate(times, start=taken + 1):
        if count % stride == 0 or count == len(result.stages):
            points.append(Point("progress/stages_done", float(count), ms(ended), count))
    return tuple(points)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _elapsed(stage: StageResult) -> float:
    assert stage.seconds is not None
    return stage.seconds


def ms(seconds: float) -> int:
    return round(seconds * 1000)
