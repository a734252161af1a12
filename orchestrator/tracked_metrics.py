"""Metrics of a variant's run: every number with the time at which its stage ended, so that a second write is the same write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.mlflow_names import metric_name
from orchestrator.results import StageResult, SweepResult, TaskInfo, VariantResult
from orchestrator.stage import Status

GIB = 2**30
PROGRESS_POINTS = 200
"""About so many points of the progress series, whatever the size of the sweep."""


@dataclass(frozen=True)
class Point:
    name: str
    value: float
    timestamp_ms: int
    step: int = 0


class Delta(Protocol):
    """Variant minus baseline, in the metric's own unit, with its interval (NaN where there is none)."""

    @property
    def delta(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


DeltaOf = Callable[[StageResult, StageResult, TaskInfo, str], Delta | None]
"""Variant's and baseline's evaluation, task, metric ▸ paired difference; `orchestrator.stats.paired_delta` is one. None, or
an exception named in the run's notes: the plain difference is logged, without an interval."""
LayerErrors = Callable[[StageResult], Mapping[int, float]]
"""Committed quantize stage ▸ mean relative weight error by decoder layer."""


def no_delta(variant: StageResult, baseline: StageResult, task: TaskInfo, metric: str) -> None:
    return None


def no_layer_errors(stage: StageResult) -> Mapping[int, float]:
    return {}


def scores(stage: StageResult) -> dict[str, float]:
    """Metrics of an evaluate stage; empty before it is committed."""
    found = stage.summary.get("metrics", stage.summary)
    return _numbers(found) if isinstance(found, Mapping) else {}


def variant_points(
    variant: VariantResult,
    baseline: VariantResult | None,
    tasks: Mapping[str, TaskInfo],
    delta_of: DeltaOf,
    layer_errors: LayerErrors,
) -> tuple[tuple[Point, ...], list[str]]:
    """All points, sorted, and notes about deltas without an interval."""
    points: list[Point] = []
    notes: list[str] = []
    if variant.quantize is not None and variant.quantize.record is not None:
        points += _quantize_points(variant.quantize, layer_errors)
    for task, stage in variant.evaluations.items():
        if stage.record is None:
            continue
        at = _ms(stage.record["ended"])
        points += [Point(metric_name("eval", task, m), v, at) for m, v in scores(stage).items()]
        points.append(Point(metric_name("time", f"evaluate_{task}_s"), _elapsed(stage), at))
        other = None if baseline is None or variant.is_baseline else baseline.evaluations.get(task)
        if other is not None and other.record is not None and task in tasks:
            made, said = _delta_points(stage, other, tasks[task], delta_of)
            points, notes = points + made, notes + said
    return tuple(sorted(points, key=lambda p: (p.name, p.step))), notes


def _quantize_points(stage: StageResult, layer_errors: LayerErrors) -> list[Point]:
    assert stage.record is not None
    at = _ms(stage.record["ended"])
    values = {"time/quantize_s": _elapsed(stage)}
    for name, value in _numbers(stage.summary).items():
        if name.startswith("bits_") or name.endswith("_bytes"):
            values[metric_name("size", name)] = value
        elif "error" in name:
            values[metric_name("err", name)] = value
    if "size/model_bytes" in values:
        values["size/model_gib"] = values["size/model_bytes"] / GIB
    series = sorted(layer_errors(stage).items())
    return [Point(n, v, at) for n, v in values.items()] + [Point("layer/weight_error", v, at, step=i) for i, v in series]


def _delta_points(stage: StageResult, other: StageResult, task: TaskInfo, delta_of: DeltaOf) -> tuple[list[Point], list[str]]:
    assert stage.record is not None
    assert other.record is not None
    at = _ms(max(stage.record["ended"], other.record["ended"]))
    base, points, notes = scores(other), [], []
    for metric, value in scores(stage).items():
        if metric not in base or metric not in task.higher_is_better:
            continue
        try:
            paired = delta_of(stage, other, task, metric)
        except Exception as e:  # the score is still worth showing; the run says why it has no interval
            paired = None
            notes.append(f"delta of {task.name}/{metric} has no interval: {e}")
        name = metric_name("delta", task.name, metric)
        points.append(Point(name, value - base[metric] if paired is None else paired.delta, at))
        if paired is not None and not (math.isnan(paired.low) or math.isnan(paired.high)):
            points += [Point(f"{name}_low", paired.low, at), Point(f"{name}_high", paired.high, at)]
    return points, notes


def progress(
    result: SweepResult, reused: Callable[[StageResult, SweepResult], bool], ended_at: Callable[[StageResult], float | None]
) -> tuple[Point, ...]:
    """Stages done over time: reused ones count from the start. The stride depends on the plan alone, so that a resumed sweep
    only adds points."""
    done = [s for s in result.stages.values() if s.status in (Status.SUCCEEDED, Status.CACHED)]
    taken = sum(reused(s, result) for s in done)
    times = sorted(t for s in done if not reused(s, result) and (t := ended_at(s)) is not None)
    stride = max(1, len(result.stages) // PROGRESS_POINTS)
    points = [Point("progress/stages_done", float(taken), _ms(result.created), taken)] if taken else []
    for count, ended in enumerate(times, start=taken + 1):
        if count % stride == 0 or count == len(result.stages):
            points.append(Point("progress/stages_done", float(count), _ms(ended), count))
    return tuple(points)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _elapsed(stage: StageResult) -> float:
    assert stage.record is not None
    return float(stage.record["ended"]) - float(stage.record["started"])


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
