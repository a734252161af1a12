"""The long table of a sweep: one row per variant × task × metric, and its CSV and Parquet files."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import PairingError
from orchestrator.results import StageResult, SweepResult, TaskInfo, VariantResult
from orchestrator.stage import Status
from orchestrator.stats import holm, paired_delta
from workers.artifact import CorruptArtifactError

CONFIDENCE = 0.95
SKIPPED = "SKIPPED"
"""Status of a row whose cell was never planned; every other row has a stage's status."""


@dataclass(frozen=True)
class Row:
    """Columns of the exported table, in order. Empty where not known."""

    sweep: str
    model: str
    method: str
    scheme: str
    calibration: str
    replicate: str
    task: str
    metric: str
    is_primary: bool
    """The headline metric of its task."""
    higher_is_better: bool
    is_baseline: bool
    status: str
    reason: str
    """Why it failed, was skipped, or has no difference to the baseline."""
    value: float | None = None
    """Score as the evaluation recorded it."""
    baseline_value: float | None = None
    delta: float | None = None
    """Value minus baseline, in the metric's unit."""
    low: float | None = None
    """Lower end of the 95 % interval of `delta`."""
    high: float | None = None
    confidence: float | None = None
    n_items: int | None = None
    interval_method: str | None = None
    interval_unit: str | None = None
    """What was resampled: document, or item."""
    n_documents: int | None = None
    """Of the items; empty where they do not tell."""
    p_value: float | None = None
    p_holm: float | None = None
    bits_nominal: float | None = None
    """Bits per weight by the scheme's label."""
    bits_stored: float | None = None
    """Bits per weight of every stored tensor, scales and zero points included."""
    kv_bits_stored: float | None = None
    """Bits per key and value of the cache, after a whole window of the task."""
    model_bytes: int | None = None
    weight_error: float | None = None
    """Mean over the quantized linears."""
    quantize_seconds: float | None = None
    evaluate_seconds: float | None = None
    peak_memory_bytes: int | None = None
    """Of the quantize stage."""
    flags: str = ""
    variant_key: str = ""
    quantize_key: str | None = None
    evaluate_key: str | None = None
    baseline_evaluate_key: str | None = None

    @property
    def separable(self) -> bool:
        """The difference stands after Holm's correction."""
        return self.p_holm is not None and self.p_holm < 1 - (self.confidence or CONFIDENCE)

    @property
    def loss(self) -> float | None:
        """How much worse than the baseline: positive is worse, whatever the metric."""
        return None if self.delta is None else (-self.delta if self.higher_is_better else self.delta)


def long_table(result: SweepResult) -> tuple[Row, ...]:
    """All rows, in sweep order; Holm's correction over all headline differences together, and over all others together."""
    variants = {v.key: v for v in result.variants}
    metrics = {name: metrics_of(result, task) for name, task in result.tasks.items()}
    rows: list[Row] = []
    for variant in result.variants:
        for name, stage in variant.evaluations.items():
            task = result.tasks[name]
            for metric in metrics[name]:
                rows.append(_row(result, variant, variants.get(variant.baseline_key), task, stage, metric))
    for primary in (True, False):
        tested = [(i, r.p_value) for i, r in enumerate(rows) if r.is_primary is primary and r.p_value is not None and not r.is_baseline]
        for (i, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
            rows[i] = replace(rows[i], p_holm=adjusted)
    return (*rows, *(_skipped_row(result, s.axes, s.reason) for s in result.skipped))


def metrics_of(result: SweepResult, task: TaskInfo) -> list[str]:
    """Metrics of a task, the headline one first: those any evaluation scored, and the headline one in any case."""
    scored = [m for v in result.variants if task.name in v.evaluations for m in v.evaluations[task.name].summary.get("scores", {})]
    return [task.primary, *sorted(set(scored) - {task.primary})]


def nominal_bits(variant: VariantResult) -> float | None:
    """Weight width: as quantized; as planned where that did not run, all rules agree, and the stage does not choose itself."""
    stage = variant.quantize or next(iter(variant.evaluations.values()), None)
    done = _number(stage.summary.get("bits_nominal")) if stage else None
    spec = variant.quantize.spec if variant.quantize else {}
    planned = {r["weight"]["bits"] for r in spec.get("rules", []) if r.get("weight") and not spec.get("auto")}
    return done if done is not None or len(planned) != 1 else float(planned.pop())


def model_size(result: SweepResult, variant: VariantResult) -> int | None:
    """Bytes of the whole model as stored; of its weight files where it is unquantized."""
    if variant.quantize is not None:
        size = variant.quantize.summary.get("model_bytes")
        return None if size is None else int(size)
    digests = [e.spec.get("model", {}).get("digest") for e in variant.evaluations.values()]
    return next((result.model_bytes[d] for d in digests if d in result.model_bytes), None)


def failure_text(result: SweepResult, stage: StageResult) -> str:
    """One line on why a stage has no result; empty for one that has."""
    if stage.status is Status.DEP_FAILED:
        cause = result.stages.get(stage.blocked_by or "")
        return f"blocked by {cause.label}: {failure_text(result, cause)}" if cause else f"blocked by {stage.blocked_by}"
    if stage.failure:
        return f"{stage.failure.get('type', 'Error')}: {stage.failure.get('message', '')}"
    return "" if stage.status in (Status.SUCCEEDED, Status.CACHED) else stage.status.value.lower()


def _row(
    result: SweepResult, variant: VariantResult, baseline: VariantResult | None, task: TaskInfo, stage: StageResult, metric: str
) -> Row:
    quantize = variant.quantize
    facts = quantize.summary if quantize else stage.summary
    base = baseline.evaluations.get(task.name) if baseline else None
    axes = variant.axes
    row = Row(
        sweep=result.key,
        model=axes.get("model", ""),
        method=axes.get("method", ""),
        scheme=axes.get("scheme", ""),
        calibration=axes.get("calibration", ""),
        replicate=axes.get("replicate", ""),
        task=task.name,
        metric=metric,
        is_primary=metric == task.primary,
        higher_is_better=task.higher_is_better.get(metric, False),
        is_baseline=variant.is_baseline,
        status=stage.status.value,
        reason=failure_text(result, stage),
        value=_number(stage.summary.get("scores", {}).get(metric)),
        bits_nominal=nominal_bits(variant),
        bits_stored=_number(facts.get("bits_stored")),
        kv_bits_stored=_number((stage.summary.get("kv") or {}).get("bits_stored")),
        model_bytes=model_size(result, variant),
        weight_error=_number(facts.get("weight_error")),
        quantize_seconds=quantize.seconds if quantize else None,
        evaluate_seconds=stage.seconds,
        peak_memory_bytes=quantize.summary.get("peak_memory_bytes") if quantize else None,
        flags="; ".join(variant.all_flags),
        variant_key=variant.key,
        quantize_key=quantize.key if quantize else None,
        evaluate_key=stage.key,
        baseline_evaluate_key=base.key if base else None,
    )
    if row.value is None or variant.is_baseline:
        return row
    return _with_delta(row, stage, base, task)


def _with_delta(row: Row, stage: StageResult, base: StageResult | None, task: TaskInfo) -> Row:
    if base is None or base.payload is None:
        state = "not in this sweep" if base is None else base.status.value
        return replace(row, reason=f"no difference: the unquantized evaluation of {task.name} is {state}")
    try:
        d = paired_delta(stage, base, task, row.metric, confidence=CONFIDENCE)
    except (PairingError, CorruptArtifactError) as e:
        return replace(row, reason=f"no difference: {e}")
    reason = row.reason
    if row.value is not None and math.isfinite(d.value) and not math.isclose(d.value, row.value, rel_tol=1e-3, abs_tol=1e-9):
        reason = f"items give {d.value:.6g} where the evaluation recorded {row.value:.6g}"
    return replace(
        row,
        reason=reason,
        baseline_value=d.baseline,
        delta=_finite(d.delta),
        low=_finite(d.low),
        high=_finite(d.high),
        confidence=d.confidence,
        n_items=d.n_items,
        interval_method=d.method,
        interval_unit=d.unit.value,
        n_documents=d.n_documents,
        p_value=_finite(d.p_value),
    )


def _skipped_row(result: SweepResult, axes: dict[str, str], reason: str) -> Row:
    task = result.tasks.get(axes.get("task", ""))
    metric = task.primary if task else ""
    return Row(
        sweep=result.key,
        model=axes.get("model", ""),
        method=axes.get("method", ""),
        scheme=axes.get("scheme", ""),
        calibration=axes.get("calibration", ""),
        replicate=axes.get("replicate", ""),
        task=axes.get("task", ""),
        metric=metric,
        is_primary=True,
        higher_is_better=task.higher_is_better.get(metric, False) if task else False,
        is_baseline=False,
        status=SKIPPED,
        reason=reason,
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _storable(value: Any) -> Any:
    """Texts as every reader takes them: bytes of a file name that are no UTF-8 as escapes, and one kind of line end, since Python's
    csv leaves a bare carriage return, as progress bars print it, unquoted, which ends the row."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\r\n", "\n").replace("\r", "\n")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Floats in the shortest form that reads back exactly; empty where not known."""
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        names = [c.name for c in fields(Row)]
        writer.writerow(names)
        writer.writerows([_storable(getattr(r, n)) for n in names] for r in rows)


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "str": pa.string()}
    schema = pa.schema([(c.name, types[str(c.type).removesuffix(" | None")]) for c in fields(Row)])
    columns = {c.name: [_storable(getattr(r, c.name)) for r in rows] for c in fields(Row)}
    pq.write_table(pa.table(columns, schema=schema), path)
