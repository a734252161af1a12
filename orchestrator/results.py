"""A sweep as its store tells it: variants with their evaluations, stages, skips. What the report, the table and MLflow read.

Built from `sweeps/<key>/plan.json`, the records and the attempts alone, so every projection can be made again at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.stage import Status


@dataclass(frozen=True)
class StageResult:
    key: str
    kind: str
    label: str
    status: Status
    """SUCCEEDED for every committed stage; FAILED; DEP_FAILED; RUNNING, where one who asks knows it; PENDING where it has not run."""
    record: dict[str, Any] | None = None
    """The committed record.json: format, key, kind, label, sweep, attempt, inputs, files, started, ended, seconds, environment, hints,
    notes, summary."""
    payload: Path | None = None
    failure: dict[str, Any] | None = None
    """Of the last attempt: error_class, type, message, log_tail, attempt, ended."""
    blocked_by: str | None = None
    """Key of the failed stage, for DEP_FAILED."""
    computed_by: str | None = None
    """Key of the sweep whose driver committed it; another sweep's key means it was reused."""
    spec: dict[str, Any] = field(default_factory=dict)
    """As planned (`workers.specs.to_json`), so that a stage that never ran still tells its bits and group size."""

    @property
    def summary(self) -> dict[str, Any]:
        return {} if self.record is None else dict(self.record["summary"])

    @property
    def seconds(self) -> float | None:
        """By the clock; None before it is committed."""
        return None if self.record is None else float(self.record["ended"]) - float(self.record["started"])

    @property
    def ended(self) -> float | None:
        """Epoch seconds at which it was committed or failed for good; None before."""
        if self.record is not None:
            return float(self.record["ended"])
        return float(self.failure["ended"]) if self.failure and self.status is Status.FAILED else None


@dataclass(frozen=True)
class TaskInfo:
    """A task of the sweep, as configured."""

    name: str
    kind: str
    primary: str
    """Headline metric."""
    higher_is_better: dict[str, bool]
    """Per metric."""


@dataclass(frozen=True)
class VariantResult:
    """A row of the table: a model with one quantization (or none) and its run-time part."""

    key: str
    label: str
    """`wikitext_llama · gptq · w4a16_g64`; the unquantized one ends in `unquantized`."""
    axes: dict[str, str]
    """model, method, scheme, calibration, replicate; method and scheme are `none` for the baseline."""
    is_baseline: bool
    baseline_key: str
    """Variant key of the unquantized model it is compared with."""
    quantize: StageResult | None
    evaluations: dict[str, StageResult]
    """Task name ▸ its evaluate stage. Payload items.parquet has one row per item, in a fixed order per task."""
    measure: StageResult | None = None
    """Speed and memory, where the sweep times its variants."""
    flags: tuple[str, ...] = ()
    """Known when it was planned, such as: smoothing without activation quantization is idle."""

    @property
    def all_flags(self) -> tuple[str, ...]:
        """And those that quantizing found."""
        found = () if self.quantize is None else self.quantize.summary.get("flags", ())
        return tuple(dict.fromkeys((*self.flags, *found)))

    @property
    def status(self) -> Status:
        stages = [s for s in (self.quantize, *self.evaluations.values(), self.measure) if s is not None]
        for status in (Status.FAILED, Status.DEP_FAILED, Status.CANCELLED, Status.RUNNING, Status.PENDING):
            if any(s.status is status for s in stages):
                return status
        return Status.SUCCEEDED


@dataclass(frozen=True)
class SkippedCell:
    axes: dict[str, str]
    """Including task."""
    reason: str


@dataclass(frozen=True)
class SweepResult:
    key: str
    name: str
    created: float
    """Epoch seconds of the first start."""
    config: dict[str, Any]
    """The composed settings and the axes' option names."""
    provenance: dict[str, Any]
    """bitgrid version, git commit and dirtiness, python, platform, package versions, hydra overrides."""
    tasks: dict[str, TaskInfo]
    variants: tuple[VariantResult, ...]
    stages: dict[str, StageResult] = field(default_factory=dict)
    """Every stage of the plan, by key."""
    skipped: tuple[SkippedCell, ...] = ()
    model_names: dict[str, str] = field(default_factory=dict)
    """Model digest ▸ option name."""
    model_bytes: dict[str, int] = field(default_factory=dict)
    """Model digest ▸ bytes of its unquantized weight files."""

    def reused(self, stage: StageResult) -> bool:
        """Whether an earlier sweep had committed the stage."""
        return stage.record is not None and stage.computed_by not in (None, self.key)
