"""A sweep arranged for reading: per model, a table with one line per variant and one column per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.report.tables import SKIPPED, Row, model_size, nominal_bits
from orchestrator.results import StageResult, SweepResult, TaskInfo, VariantResult
from orchestrator.stage import Status
from orchestrator.stats import FEWEST_DOCUMENTS, Unit

BASELINE = "unquantized"
FAILED_STATES = (Status.FAILED.value, Status.DEP_FAILED.value)


@dataclass(frozen=True)
class Line:
    """A variant with its headline row per task."""

    variant: VariantResult
    name: str
    """Unique within its model: method · scheme, with calibration and replicate where these vary."""
    contender: str
    """The name without the replicate: the same for variants that differ in it alone."""
    cells: dict[str, Row]
    """Task ▸ its headline row; a task that was never asked of this variant is absent."""
    others: dict[str, tuple[Row, ...]]
    """Task ▸ rows of its other metrics."""
    family: str
    """What must not be joined by a line: granularity and run-time parts, as in `g64` or `channel a8 kv4`."""

    bits_nominal: float | None
    bits_stored: float | None
    model_bytes: int | None

    @property
    def kv_bits_stored(self) -> tuple[float, ...]:
        """Distinct values over the tasks, ascending: a window of another length keeps another share in full precision."""
        return tuple(sorted({r.kv_bits_stored for r in self.cells.values() if r.kv_bits_stored is not None}))

    @property
    def method(self) -> str:
        return BASELINE if self.variant.is_baseline else self.variant.axes.get("method", "")

    @property
    def scheme(self) -> str:
        return BASELINE if self.variant.is_baseline else self.variant.axes.get("scheme", "")


@dataclass(frozen=True)
class ModelTable:
    """All variants of one model, the unquantized first."""

    model: str
    tasks: tuple[TaskInfo, ...]
    lines: tuple[Line, ...]

    @property
    def baseline(self) -> Line | None:
        return next((x for x in self.lines if x.variant.is_baseline), None)

    @cached_property
    def has_caches(self) -> bool:
        """Whether a variant stores keys and values quantized."""
        return any(x.kv_bits_stored for x in self.lines)

    @property
    def quantized(self) -> tuple[Line, ...]:
        return tuple(x for x in self.lines if not x.variant.is_baseline)


@dataclass(frozen=True)
class Counts:
    """Scores (variant × task, the unquantized model included) by what became of them."""

    done: int
    failed: int
    waiting: int
    skipped: int
    """Cells of the grid, which have no score."""

    @property
    def scores(self) -> int:
        return self.done + self.failed + self.waiting


def model_tables(result: SweepResult, rows: Sequence[Row]) -> tuple[ModelTable, ...]:
    models = list(dict.fromkeys(v.axes.get("model", "") for v in result.variants))
    return tuple(_model_table(result, rows, model) for model in models)


def counts(rows: Sequence[Row]) -> Counts:
    states = [r.status for r in rows if r.is_primary]
    done = sum(s in (Status.SUCCEEDED.value, Status.CACHED.value) for s in states)
    failed, skipped = sum(s in FAILED_STATES for s in states), states.count(SKIPPED)
    return Counts(done, failed, len(states) - done - failed - skipped, skipped)


def state_word(row: Row) -> str:
    """What stands in the table where there is no score."""
    return "FAILED" if row.status in FAILED_STATES else row.status.lower()


def failures(result: SweepResult) -> list[tuple[str, list[StageResult]]]:
    """Failed stages grouped by error, the most frequent first."""
    groups: dict[str, list[StageResult]] = {}
    for stage in result.stages.values():
        if stage.status is Status.FAILED:
            f = stage.failure or {}
            groups.setdefault(f"{f.get('type', 'Error')}: {f.get('message', 'no message recorded')}", []).append(stage)
    return sorted(groups.items(), key=lambda g: -len(g[1]))


def skips(result: SweepResult) -> list[tuple[str, list[dict[str, str]]]]:
    """Skipped cells grouped by reason, the most frequent first."""
    groups: dict[str, list[dict[str, str]]] = {}
    for cell in result.skipped:
        groups.setdefault(cell.reason, []).append(cell.axes)
    return sorted(groups.items(), key=lambda g: -len(g[1]))


def resampled(model: ModelTable) -> str:
    """What the intervals of a model rest on: `self_perplexity: 42 documents of 64 items`; and why, where that is not documents."""
    said = []
    for task in model.tasks:
        rows = [x.cells[task.name] for x in model.lines if task.name in x.cells]
        kinds = dict.fromkeys((r.interval_unit, r.n_documents, r.n_items) for r in rows if r.interval_unit is not None)
        said += [f"{task.name}: {_units(*kind)}" for kind in kinds]
    return "; ".join(said)


def _units(unit: str | None, documents: int | None, items: int | None) -> str:
    if unit == Unit.DOCUMENT.value:
        return f"{documents} documents of {items} items"
    if items == 1:
        return "1 item, which gives no interval"
    if documents is None:
        return f"{items} items, which do not tell their documents"
    few = "1 document is" if documents == 1 else f"{documents} documents are"
    return f"{items} items, since their {few} fewer than {FEWEST_DOCUMENTS}"


def remarks(result: SweepResult) -> list[tuple[str, list[str]]]:
    """Flags of variants and notes of stages (fallbacks, approximations) ▸ whom they concern."""
    groups: dict[str, list[str]] = {}
    for variant in result.variants:
        for flag in variant.all_flags:
            groups.setdefault(flag, []).append(variant.label)
    for stage in result.stages.values():
        for note in dict.fromkeys((stage.record or {}).get("notes", ())):
            groups.setdefault(note, []).append(stage.label)
    return list(groups.items())


def _model_table(result: SweepResult, rows: Sequence[Row], model: str) -> ModelTable:
    variants = [v for v in result.variants if v.axes.get("model", "") == model]
    variants = [v for v in variants if v.is_baseline] + [v for v in variants if not v.is_baseline]
    varying = [a for a in ("calibration", "replicate") if len({v.axes.get(a) for v in variants if not v.is_baseline}) > 1]
    by_variant: dict[str, list[Row]] = {}
    for row in rows:
        if row.variant_key:
            by_variant.setdefault(row.variant_key, []).append(row)
    asked = {task for v in variants for task in v.evaluations}
    return ModelTable(
        model=model,
        tasks=tuple(t for name, t in result.tasks.items() if name in asked),
        lines=tuple(_line(result, v, by_variant.get(v.key, []), varying) for v in variants),
    )


def _line(result: SweepResult, variant: VariantResult, rows: Sequence[Row], varying: Sequence[str]) -> Line:
    parts = {a: variant.axes.get(a, "") for a in ("method", "scheme", *varying)}
    others: dict[str, tuple[Row, ...]] = {}
    for row in rows:
        if not row.is_primary:
            others[row.task] = (*others.get(row.task, ()), row)
    return Line(
        variant=variant,
        name=BASELINE if variant.is_baseline else " · ".join(parts.values()),
        contender=BASELINE if variant.is_baseline else " · ".join(part for axis, part in parts.items() if axis != "replicate"),
        cells={r.task: r for r in rows if r.is_primary},
        others=others,
        family=_family(variant),
        bits_nominal=nominal_bits(variant),
        bits_stored=variant.quantize.summary.get("bits_stored") if variant.quantize else None,
        model_bytes=model_size(result, variant),
    )


def _family(variant: VariantResult) -> str:
    weights = [r.get("weight", {}) for r in (variant.quantize.spec.get("rules", []) if variant.quantize else ())]
    names = {f"g{w['group_size']}" if w.get("group_size") else w.get("granularity", "channel") for w in weights}
    parts = [names.pop() if len(names) == 1 else "mixed"] if names else []
    for letter, field in (("a", "activation"), ("kv", "kv")):
        part = next((s for e in variant.evaluations.values() if (s := e.spec.get(field))), None)
        if part:
            kind = f" {part['kind']}" if part.get("kind") else ""
            static = "" if part.get("dynamic", True) else "s"
            parts.append(f"{letter}{part['bits']}{static}{'t' if part.get('granularity') == 'tensor' else ''}{kind}")
    return " ".join(parts)
