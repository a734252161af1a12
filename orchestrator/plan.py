"""Cells ▸ the deduplicated graph of stages.

* One calibrate stage per statistic kind, model and calibration draw; every method, bit-width and group size shares it.
* With automatic bits, one quantize stage per candidate width, and one prepare stage for the sensitivity table made from them.
* One quantize stage per model, method, weight scheme (and whatever else the method declares it reads), whatever the number of
  tasks and run-time parts.
* One calibrate stage more per model and calibration draw where the sweep wants site statistics for its report.
* One measure stage per variant where the sweep times them, but for those that only a simulation runs.
* One evaluate stage per variant and task; the unquantized model's, once per model and task, is the baseline.

Cells that cannot work (a group size that does not divide, a family that is not known, a window longer than the model's positions) are
skipped with their reason, or refused when nothing else was asked for. Nothing is run and no torch imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, TypeVar

from orchestrator import impossible, parts
from orchestrator.cell import Cell, Grid, Option
from orchestrator.errors import ConfigError, PlanError
from orchestrator.facts import check_facts
from orchestrator.fingerprint import digest, stage_key
from orchestrator.measuring import check_length, measured_cache, measuring, unmeasured
from orchestrator.overrides import has_overrides, rules
from orchestrator.planned import Plan, PlannedCell, PlannedVariant, Skip
from orchestrator.sources import ModelSource, Sources
from orchestrator.stage import Resources, Stage
from quant.scheme import Scheme, WeightScheme
from workers import kv_rules
from workers.errors import UnsupportedModel
from workers.families import forward_version, linear_shapes
from workers.specs import (
    DTYPES,
    AutoBits,
    CalibrateSpec,
    CalibrationSpec,
    EvaluateSpec,
    MeasureSpec,
    ModelSpec,
    PrepareSpec,
    QuantizeSpec,
    Rule,
    Spec,
    StageKind,
    to_json,
)

T = TypeVar("T")
Estimate = Callable[[Spec, ModelSource], Resources]


def build_plan(grid: Grid, sources: Sources, estimate: Estimate = lambda spec, model: Resources()) -> Plan:
    """Raises PlanError, ConfigError, SourceError."""
    return _Planner(grid, sources, estimate).plan()


class _Planner:
    """Remembers every part by the identity of its options, so that a cell costs a few look-ups."""

    def __init__(self, grid: Grid, sources: Sources, estimate: Estimate) -> None:
        self._grid = grid
        self._sources = sources
        self._estimate = estimate
        self._made: dict[Hashable, Any] = {}
        self._plan = Plan(grid, notes=list(grid.notes))
        self._measuring = measuring(grid.settings)
        self._several = {axis: len({id(getattr(c, axis)) for c in grid.cells}) > 1 for axis in ("calibration", "replicate")}

    def plan(self) -> Plan:
        plan = self._plan
        if not self._grid.cells:
            raise PlanError("the grid has no cells: every one was excluded; loosen sweep.exclude or sweep.only_if")
        self._check_model_path()
        self._check_budget()
        for option in {id(o): o for c in self._grid.cells for o in (c.method, c.task)}.values():
            check_facts(option)
        for cell in self._grid.cells:
            reason = self._impossible(cell)
            if reason is None:
                self._add(cell)
                self._add_site_statistics(cell)
                self._add_measurements(cell)
            else:
                plan.skipped.append(Skip(cell, reason))
        if not plan.cells:
            reasons = "\n".join(f"  {reason}" for reason in dict.fromkeys(s.reason for s in plan.skipped))
            raise PlanError(f"none of the {len(plan.skipped)} cells asked for is possible:\n{reasons}")
        plan.notes += self._sources.notes
        skipped = sorted("|".join(s.cell.names().values()) for s in plan.skipped)
        plan.key = digest({"evaluate": sorted({c.evaluate for c in plan.cells}), "skipped": skipped})
        return plan

    def _check_model_path(self) -> None:
        """Refuses one folder under several names: `model=a,b model.path=...` would compare a model with itself."""
        named: dict[str, set[str]] = {}
        for cell in self._grid.cells:
            if cell.model.values.get("path"):
                named.setdefault(str(cell.model.values["path"]), set()).add(cell.model.file)
        for path, names in named.items():
            if len(names) > 1:
                raise ConfigError(
                    f"model.path= is for a single model, but {path} would stand for {', '.join(sorted(names))}; "
                    "put their folders into one and set models_dir= to it"
                )

    def _check_budget(self) -> None:
        budget = self._grid.settings.get("budget")
        schemes = {id(c.scheme): c.scheme for c in self._grid.cells}.values()
        if budget is None or any((s.values.get("auto") or {}).get("budget") == budget for s in schemes):
            return
        names = ", ".join(s.name for s in schemes)
        raise ConfigError(f"budget={budget} is read by no scheme of the grid, which has {names}; choose scheme=auto, or leave budget out")

    # -- parts, each made once -------------------------------------------------------------------------------------

    def _once(self, name: Hashable, make: Callable[[], T]) -> T:
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def _model(self, option: Option) -> tuple[ModelSource, ModelSpec]:
        def make() -> tuple[ModelSource, ModelSpec]:
            source = self._sources.model(option)
            dtype = option.values.get("dtype", "float32")
            if dtype not in DTYPES:
                raise ConfigError(f"model {option.name!r}: dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
            self._plan.models.setdefault(source.digest, source)
            return source, ModelSpec(source.digest, dtype, forward_version(source.config))

        return self._once(("model", id(option)), make)

    def _scheme(self, option: Option) -> Scheme:
        return self._once(("scheme", id(option)), lambda: parts.scheme_part(option))

    def _method(self, option: Option) -> parts.MethodPart:
        return self._once(("method", id(option)), lambda: parts.method_part(option))

    def _auto(self, option: Option) -> parts.AutoPart | None:
        return self._once(("auto", id(option)), lambda: parts.auto_part(option, self._scheme(option).weight))

    def _scheme_name(self, option: Option) -> str:
        """With the budget of automatic bits, which a setting of the sweep may give; as a sweep over budgets names it."""
        auto = self._auto(option)
        if auto is None or "auto.budget=" in option.name:
            return option.name
        swept = option.name[len(option.file) + 1 : -1]
        return f"{option.file}[{swept + ',' if swept else ''}auto.budget={auto.auto.budget:g}]"

    def _task(self, option: Option) -> parts.TaskPart:
        def make() -> parts.TaskPart:
            # Scores of a variant are told apart by the task's name.
            if self._once(("task named", option.name), lambda: option).values != option.values:
                raise PlanError(
                    f"two tasks of the grid are called {option.name!r} and differ in their values; "
                    "sweep the value that differs, so that names have it, or write an option file in conf/task/ for one of them"
                )
            source = self._sources.text(option)
            part = parts.task_part(option, source)
            self._plan.texts[source.digest] = source
            self._plan.tasks[option.name] = part.info
            return part

        return self._once(("task", id(option)), make)

    def _calibration(self, cell: Cell) -> CalibrationSpec:
        def make() -> CalibrationSpec:
            source = self._sources.text(cell.calibration)
            self._plan.texts[source.digest] = source
            return parts.calibration_part(cell.calibration, source, parts.replicate_seed(cell.replicate))

        return self._once(("calibration", id(cell.calibration), id(cell.replicate)), make)

    # -- what cannot work ------------------------------------------------------------------------------------------

    def _impossible(self, cell: Cell) -> str | None:
        name = ("impossible", id(cell.model), id(cell.method), id(cell.scheme))
        return self._once(name, lambda: self._why_impossible(cell)) or self._too_long(cell)

    def _why_impossible(self, cell: Cell) -> str | None:
        source, _ = self._model(cell.model)
        if source.provisional or not source.config:
            return None
        scheme, method, auto = self._scheme(cell.scheme), self._method(cell.method), self._auto(cell.scheme)
        return impossible.why_impossible(cell, source.config, scheme, method, auto, lambda weight: self._rules(cell, weight))

    def _too_long(self, cell: Cell) -> str | None:
        def feeds_text() -> bool:
            return impossible.feeds_text(self._scheme(cell.scheme), self._method(cell.method), self._auto(cell.scheme))

        name = ("window", id(cell.model), id(cell.task))
        reason = self._once(name, lambda: impossible.long_window(cell, self._model(cell.model)[0].config))
        if reason is None and self._once(("feeds text", id(cell.method), id(cell.scheme)), feeds_text):
            return self._long_calibration(cell)
        return reason

    def _long_calibration(self, cell: Cell) -> str | None:
        name = ("length", id(cell.model), id(cell.calibration))
        return self._once(name, lambda: impossible.long_calibration(cell, self._model(cell.model)[0].config))

    # -- stages ----------------------------------------------------------------------------------------------------

    def _rules(self, cell: Cell, weight: WeightScheme) -> tuple[Rule, ...]:
        def make() -> tuple[Rule, ...]:
            source, _ = self._model(cell.model)
            return rules(cell.method, self._method(cell.method).spec, cell.scheme, weight, cell.model.name, source.config)

        # Without overrides the model does not matter.
        by_model = id(cell.model) if has_overrides(cell.method, cell.scheme) else None
        return self._once(("rules", by_model, id(cell.method), id(cell.scheme)), make)

    def _add(self, cell: Cell) -> None:
        task = self._task(cell.task)
        baseline = self._baseline(cell)
        reference = baseline.evaluations.get(cell.task.name)
        if reference is None:
            _, model = self._model(cell.model)
            label = f"evaluate {cell.model.name} unquantized {cell.task.name}"
            reference = self._stage(StageKind.EVALUATE, EvaluateSpec(model, task.spec), {}, label)
            baseline.evaluations[cell.task.name] = reference
        variant = self._variant(cell, baseline)
        evaluate = variant.evaluations.get(cell.task.name)
        if evaluate is None:
            _, model = self._model(cell.model)
            scheme = self._scheme(cell.scheme)
            inputs = {"quantize": variant.quantize} if variant.quantize else {}
            if task.needs_reference:
                inputs["reference"] = reference
            inputs |= self._kv_statistics(cell, model, scheme)
            spec = EvaluateSpec(model, task.spec, scheme.activation, scheme.kv)
            evaluate = self._stage(StageKind.EVALUATE, spec, inputs, f"evaluate {_label(variant)} {cell.task.name}")
            variant.evaluations[cell.task.name] = evaluate
        self._plan.cells.append(PlannedCell(cell, variant.key, evaluate))

    def _add_site_statistics(self, cell: Cell) -> None:
        if self._grid.settings.get("site_statistics"):
            name = ("site statistics", id(cell.model), id(cell.calibration), id(cell.replicate))
            self._once(name, lambda: self._site_statistics(cell))

    def _site_statistics(self, cell: Cell) -> None:
        source, model = self._model(cell.model)
        try:
            if source.config:
                linear_shapes(source.config)
        except UnsupportedModel as e:
            self._plan.notes.append(f"no site statistics of {cell.model.name}: {e}")
            return
        reason = self._long_calibration(cell)
        if reason is not None:
            self._plan.notes.append(f"no site statistics of {reason}")
            return
        key = self._calibrate(cell, model, self._calibration(cell), parts.SITE_STATISTICS)
        if key not in self._plan.wanted:
            self._plan.wanted.append(key)

    def _add_measurements(self, cell: Cell) -> None:
        if self._measuring is None:
            return
        baseline = self._baseline(cell)
        for variant in (baseline, self._variant(cell, baseline)):
            self._once(("measure", variant.key), partial(self._measure, cell, variant))

    def _measure(self, cell: Cell, variant: PlannedVariant) -> None:
        assert self._measuring is not None
        workload, device = self._measuring
        (source, model), scheme = self._model(cell.model), self._scheme(cell.scheme)
        check_length(workload, source.config, cell.model.name)
        reason = unmeasured(None if variant.is_baseline else scheme, source.config, workload)
        if reason is not None:
            variant.flags += (f"not measured: {reason}",)
            return
        inputs = {"quantize": variant.quantize} if variant.quantize else {}
        runtime = () if variant.is_baseline else (scheme.activation, measured_cache(scheme.kv))
        spec = MeasureSpec(model, workload, device, *runtime)
        variant.measure = self._stage(StageKind.MEASURE, spec, inputs, f"measure {_label(variant)}")
        self._plan.wanted.append(variant.measure)

    def _baseline(self, cell: Cell) -> PlannedVariant:
        def make() -> PlannedVariant:
            _, model = self._model(cell.model)
            key = digest({"model": [model.digest, model.dtype]})
            axes = {"model": cell.model.name, "method": "none", "scheme": "none", "calibration": "none", "replicate": "none"}
            variant = PlannedVariant(key, f"{cell.model.name} · unquantized", axes, key, None, {})
            return self._plan.variants.setdefault(key, variant)

        return self._once(("baseline", id(cell.model)), make)

    def _variant(self, cell: Cell, baseline: PlannedVariant) -> PlannedVariant:
        def make() -> PlannedVariant:
            _, model = self._model(cell.model)
            scheme = self._scheme(cell.scheme)
            quantize = self._quantize(cell)
            if quantize is None and scheme.activation is None and scheme.kv is None:
                return baseline
            runtime: dict[str, Any] = {
                n: to_json(part) for n, part in (("activation", scheme.activation), ("kv", scheme.kv)) if part is not None
            }
            calibrated = self._kv_statistics(cell, model, scheme)
            if calibrated:
                runtime["kv_calibration"] = calibrated["kv"]
            key = digest({"quantize": quantize or [model.digest, model.dtype], **runtime})
            axes = {o.axis: o.name for o in cell if o.axis != "task"} | {"scheme": self._scheme_name(cell.scheme)}
            names = [axes[a] for a in ("model", "method", "scheme")]
            names += [o.name for o in (cell.calibration, cell.replicate) if self._several[o.axis]]
            variant = PlannedVariant(key, " · ".join(names), axes, baseline.key, quantize, {}, self._flags(cell, scheme))
            return self._plan.variants.setdefault(key, variant)

        return self._once(("variant", *(id(o) for o in cell if o.axis != "task")), make)

    def _flags(self, cell: Cell, scheme: Scheme) -> tuple[str, ...]:
        method = self._method(cell.method)
        flags = []
        if scheme.weight is None:
            flags.append(f"method {cell.method.name} is idle: the scheme leaves weights unquantized")
        elif scheme.activation is None and method.idle_without_activation:
            flags.append(f"{', '.join(method.idle_without_activation)} is idle without activation quantization")
        recollects = method.recollects(self._model(cell.model)[0].config) if scheme.weight is not None else None
        if recollects is not None:
            flags.append(f"the quantize stage collects statistics of the rotated model itself: {recollects}")
        if scheme.kv is not None:
            flags.append(kv_rules.label(scheme.kv))
        return tuple(flags)

    def _quantize(self, cell: Cell) -> str | None:
        weight = self._scheme(cell.scheme).weight
        if weight is None:
            return None
        auto = self._auto(cell.scheme)
        if auto is None:
            return self._quantize_stage(cell, self._rules(cell, weight), "")
        _, model = self._model(cell.model)
        spec = self._method(cell.method).spec
        candidates = {}
        for i, candidate in enumerate(auto.auto.candidates):
            candidates[auto.auto.role(i)] = self._quantize_stage(cell, (Rule("*", spec, candidate),), f" {candidate.bits} bits")
        search = PrepareSpec(model, "sensitivity", 1, self._calibration(cell), (("sequences", auto.sequences),))
        label = f"prepare {cell.model.name} {cell.method.name} {cell.scheme.name} sensitivity"
        table = self._stage(StageKind.PREPARE, search, candidates, label)
        return self._quantize_stage(cell, (Rule("*", spec, auto.auto.candidates[0]),), "", auto.auto, {"sensitivity": table})

    def _quantize_stage(
        self, cell: Cell, table: tuple[Rule, ...], suffix: str, auto: AutoBits | None = None, more: Mapping[str, str] | None = None
    ) -> str:
        scheme, method = self._scheme(cell.scheme), self._method(cell.method)
        source, model = self._model(cell.model)
        static = scheme.activation if scheme.activation is not None and not scheme.activation.dynamic else None
        recollects = method.recollects(source.config) is not None
        feeds = method.feeds_text or static is not None or recollects
        calibration = self._calibration(cell) if method.calibrate or feeds else None
        inputs = dict(more or {})
        for statistic in () if recollects else method.calibrate:
            assert calibration is not None
            inputs[statistic] = self._calibrate(cell, model, calibration, statistic)
        spec = QuantizeSpec(
            model=model,
            rules=table,
            calibration=calibration if feeds else None,
            activation=scheme.activation if static is not None or "activation" in method.reads else None,
            kv=scheme.kv if "kv" in method.reads else None,
            seed=parts.replicate_seed(cell.replicate) if method.uses_seed else None,
            auto=auto,
        )
        told = parts.draw(cell, self._several, calibration, seeded=method.uses_seed) + suffix
        key = self._stage(StageKind.QUANTIZE, spec, inputs, f"quantize {cell.model.name} {cell.method.name} {cell.scheme.name}{told}")
        if method.toolkit is not None:
            self._plan.toolkits[key] = method.toolkit
        return key

    def _kv_statistics(self, cell: Cell, model: ModelSpec, scheme: Scheme) -> dict[str, str]:
        """Statistic ▸ key of its calibrate stage."""
        wanted = scheme.kv.statistics if scheme.kv is not None else ()
        return {s: self._calibrate(cell, model, self._calibration(cell), s) for s in wanted}

    def _calibrate(self, cell: Cell, model: ModelSpec, calibration: CalibrationSpec, statistic: str) -> str:
        def make() -> str:
            several = {**self._several, "calibration": True}
            label = f"calibrate {cell.model.name}{parts.draw(cell, several, calibration)} {statistic}"
            return self._stage(StageKind.CALIBRATE, CalibrateSpec(model, calibration, statistic), {}, label)

        return self._once(("calibrate", id(cell.model), id(cell.calibration), id(cell.replicate), statistic), make)

    def _stage(self, kind: StageKind, spec: Spec, inputs: Mapping[str, str], label: str) -> str:
        key = stage_key(kind, spec, inputs)
        if key not in self._plan.stages:
            resources = self._estimate(spec, self._plan.models[spec.model.digest])
            self._plan.stages[key] = Stage(key, kind, spec, label, dict(inputs), resources)
        return key


def _label(variant: PlannedVariant) -> str:
    return variant.label.replace(" · ", " ")
