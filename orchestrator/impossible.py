"""Why a cell cannot work, told from its options and the model's config.json before anything is paid for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.cell import Cell
from orchestrator.overrides import check_linears, has_overrides
from orchestrator.parts import AutoPart, MethodPart
from quant.parameters import refuses_scheme, undivided
from quant.scheme import Scheme, WeightScheme
from workers import kv_rules
from workers.errors import UnsupportedModel
from workers.families import linear_shapes
from workers.positions import refuses_calibration, refuses_window
from workers.specs import CalibrationSpec, Rule
from workers.structure import LinearShape

Config = Mapping[str, Any]
RulesOf = Callable[[WeightScheme], tuple[Rule, ...]]


def why_impossible(cell: Cell, config: Config, scheme: Scheme, method: MethodPart, auto: AutoPart | None, rules: RulesOf) -> str | None:
    """What of model, method and scheme do not go together; None where all do. `rules` makes the rows of the quantize stage."""
    if scheme.weight is not None or scheme.activation is not None:
        try:
            shapes = linear_shapes(config)
        except UnsupportedModel as e:
            return f"{cell.model.name}: {e}"
        if scheme.weight is not None:
            reason = _why_not_quantized(cell, scheme.weight, config, shapes, method, auto, rules)
            if reason is not None:
                return reason
    refusal = kv_rules.refuses(scheme.kv, config) if scheme.kv is not None else None
    return None if refusal is None else f"{cell.model.name}: {refusal}"


def _why_not_quantized(
    cell: Cell,
    weight: WeightScheme,
    config: Config,
    shapes: tuple[LinearShape, ...],
    method: MethodPart,
    auto: AutoPart | None,
    rules: RulesOf,
) -> str | None:
    if method.toolkit is not None and method.spec.transforms:
        return f"method {cell.method.name}: {method.toolkit.toolkit} quantizes the checkpoint as it is; leave transforms out"
    reason = method.cannot_rotate(config)
    if reason is not None:
        return f"{cell.model.name}: {reason}"
    if auto is not None:
        if method.spec.transforms or has_overrides(cell.method, cell.scheme):
            return f"method {cell.method.name}: automatic bits work with methods without transforms and overrides"
        refusal = next((r for w in auto.auto.candidates if (r := method.refuses(w, config.get("model_type"))) is not None), None)
        if refusal is not None:
            return _of_option(cell, refusal)
    table = rules(weight)
    for spec in dict.fromkeys(rule.method for rule in table):
        check_linears(cell.method, spec, shapes, cell.model.name)
    for scheme in dict.fromkeys(rule.weight for rule in table):
        refusal = method.refuses(scheme, config.get("model_type"))
        if refusal is not None:
            return _of_option(cell, refusal)
    for rule in table:
        for part in (*rule.method.transforms, rule.method.rounding):
            refusal = refuses_scheme(part.name, dict(part.params), rule.weight)
            if refusal is not None:
                return f"method {cell.method.name}: {refusal}"
    chosen = {s.name: table[0] for s in shapes} if len(table) == 1 and table[0].pattern == "*" else {r.pattern: r for r in table}
    bad: dict[str, list[tuple[str, int, str]]] = {}
    for s in shapes:
        if (row := chosen.get(s.name)) is not None:
            components = zip((*row.method.transforms, row.method.rounding), method.supports, strict=True)
            parts = ((c.name, dict(c.params), supports) for c, (_, supports) in components)
            found = undivided(parts, row.weight.group_size, s.rows, s.cols)
            if found is not None:
                bad.setdefault(found[0], []).append((s.name, found[1], found[2]))
    for what, linears in bad.items():
        widths, of = ", ".join(map(str, sorted({n for _, n, _ in linears}))), linears[0][2]
        return f"{cell.model.name}: {what} {widths} {of} ({len(linears)} linears, first {linears[0][0]})"
    return None


def _of_option(cell: Cell, refusal: str) -> str:
    """The refusal of a rounding or transform, with the option that has it: of `awq` the rounding is `rtn`."""
    name = cell.method.name
    return refusal if refusal.startswith(f"{name} ") else f"method {name}: {refusal}"


def long_window(cell: Cell, config: Config) -> str | None:
    """Why the model cannot be scored on the task's windows."""
    window = (cell.task.values.get("params") or {}).get("window")
    refusal = refuses_window(window, config) if isinstance(window, int) else None
    return None if refusal is None else f"{cell.model.name}: {refusal}"


def long_calibration(cell: Cell, config: Config) -> str | None:
    """Why the model cannot be fed samples of the calibration."""
    length = cell.calibration.values.get("sequence_length", CalibrationSpec.sequence_length)
    refusal = refuses_calibration(length, config) if isinstance(length, int) else None
    return None if refusal is None else f"{cell.model.name}: {refusal}"


def feeds_text(scheme: Scheme, method: MethodPart, auto: AutoPart | None) -> bool:
    """Whether any stage of a cell is fed calibration text: a calibrate stage, or one that feeds it itself."""
    static = scheme.activation is not None and not scheme.activation.dynamic
    quantize = scheme.weight is not None and (bool(method.calibrate) or method.feeds_text or static or auto is not None)
    return quantize or (scheme.kv is not None and bool(scheme.kv.statistics))
