"""What a plan is made of: cells with their keys, variants, skips. Pure data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from orchestrator.cell import Cell, Grid
from orchestrator.results import TaskInfo
from orchestrator.sources import ModelSource, TextSource
from orchestrator.stage import Stage
from workers.specs import StageKind, to_json


class PlannedCell(NamedTuple):
    cell: Cell
    variant: str
    evaluate: str


class Skip(NamedTuple):
    cell: Cell
    reason: str


@dataclass(slots=True)
class PlannedVariant:
    key: str
    label: str
    axes: dict[str, str]
    baseline: str
    """Variant key of the unquantized model; its own key for the baseline."""
    quantize: str | None
    evaluations: dict[str, str]
    """Task ▸ key of the evaluate stage."""
    flags: tuple[str, ...] = ()
    measure: str | None = None
    """Key of the measure stage, where the sweep times its variants."""

    @property
    def is_baseline(self) -> bool:
        return self.key == self.baseline


class ToolkitNeed(NamedTuple):
    """An environment that a quantize stage runs in."""

    toolkit: str
    release: str


@dataclass
class Plan:
    """The deduplicated graph of stages behind a grid. Dictionaries are in sweep order."""

    grid: Grid
    stages: dict[str, Stage] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)
    variants: dict[str, PlannedVariant] = field(default_factory=dict)
    skipped: list[Skip] = field(default_factory=list)
    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    models: dict[str, ModelSource] = field(default_factory=dict)
    """By digest."""
    texts: dict[str, TextSource] = field(default_factory=dict)
    """By digest."""
    wanted: list[str] = field(default_factory=list)
    """Keys of stages that the sweep wants for its report, besides what its evaluations need."""
    toolkits: dict[str, ToolkitNeed] = field(default_factory=dict)
    """By key of the quantize stage that runs one."""
    notes: list[str] = field(default_factory=list)
    key: str = ""
    """Of the sweep: a digest of all its evaluate keys and skipped cells, so the same grid is the same sweep."""

    def is_result(self, key: str) -> bool:
        """Whether report, MLflow or export read this stage, not only the stages after it."""
        return self.stages[key].kind in (StageKind.QUANTIZE, StageKind.EVALUATE) or key in self.wanted

    def to_json(self) -> dict[str, Any]:
        """The part that is stored with the sweep (see orchestrator.sweeps)."""
        return {
            "key": self.key,
            "cells": [{**c.cell.names(), "variant": c.variant, "evaluate": c.evaluate} for c in self.cells],
            "skipped": [{"axes": s.cell.names(), "reason": s.reason} for s in self.skipped],
            "variants": {
                v.key: {
                    "label": v.label,
                    "axes": v.axes,
                    "baseline": v.baseline,
                    "quantize": v.quantize,
                    "evaluations": v.evaluations,
                    "flags": list(v.flags),
                    "measure": v.measure,
                }
                for v in self.variants.values()
            },
            "stages": {
                s.key: {"kind": s.kind.value, "label": s.label, "inputs": s.inputs, "spec": to_json(s.spec)} for s in self.stages.values()
            },
            "wanted": self.wanted,
            "tasks": {t.name: {"kind": t.kind, "primary": t.primary, "higher_is_better": t.higher_is_better} for t in self.tasks.values()},
            "models": {
                digest: {"name": m.name, "location": asdict(m.location), "bytes": m.weight_bytes} for digest, m in self.models.items()
            },
            "notes": self.notes,
        }
