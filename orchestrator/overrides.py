"""Overrides per linear ▸ the rules of a quantize stage.

    scheme.overrides:   {"*.down_proj": {bits: 8}, "model.layers.0.*": null}    weight fields over the scheme's own; null leaves alone
    method.overrides:   {"*.o_proj": {damp: 0.1}}                               parameters of the rounding over the method's own

Patterns are those of a shell (`fnmatch`) on full module names. Of each mapping the last pattern that matches a linear decides.
Without overrides one rule `*` serves all linears; with them the stage is given, and its key digests, the full table: one rule per
linear by name. A pattern that matches no linear is an error; so is one among a method's parameters (`layer_bits`, `bit_lists`).
A tuner has one set of parameters for all its linears: overrides of the method can only leave some alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from orchestrator.cell import Option
from orchestrator.errors import ConfigError, PlanError, unknown_name
from quant.scheme import WeightScheme
from workers.families import linear_shapes
from workers.specs import MethodSpec, Rule, freeze, from_json, to_json
from workers.structure import LinearShape

T = TypeVar("T")


def has_overrides(*options: Option) -> bool:
    return any(o.values.get("overrides") for o in options)


def rules(
    method_option: Option, method: MethodSpec, scheme_option: Option, weight: WeightScheme, model: str, config: Mapping[str, Any]
) -> tuple[Rule, ...]:
    """`config` is the model's parsed config.json, empty where it is not known yet.

    Raises ConfigError for wrong fields or values, PlanError for a pattern that matches nothing or a model that is not known."""
    if not has_overrides(method_option, scheme_option):
        return (Rule("*", method, weight),)
    if not config:
        raise PlanError(
            f"overrides are resolved linear by linear, and the hub could not be asked for {model}'s config.json; try with a network"
        )
    shapes = linear_shapes(config)
    weights = _resolved(scheme_option, shapes, model, lambda changes: _weight(scheme_option, weight, changes))
    methods = _resolved(method_option, shapes, model, lambda changes: _method(method_option, method, changes))
    out = []
    for shape in shapes:
        chosen, made = weights.get(shape.name, weight), methods.get(shape.name, method)
        if chosen is not None and made is not None:
            out.append(Rule(shape.name, made, chosen))
    if not out:
        raise PlanError(
            f"scheme={scheme_option.name}, method={method_option.name}: the overrides leave no linear of {model} to quantize; "
            "give null for fewer, or a scheme with weight=null for none"
        )
    return tuple(out)


def _resolved(option: Option, shapes: Sequence[LinearShape], model: str, make: Callable[[Mapping[str, Any]], T]) -> dict[str, T | None]:
    """Linear ▸ what its last matching pattern makes of it; linears that no pattern matches are left out."""
    where = f"{option.axis}={option.name}: overrides"
    patterns = option.values.get("overrides") or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{where} is {patterns!r}; give a mapping from module patterns to changes, as {{'*.down_proj': {{...}}}}")
    found: dict[str, T | None] = {}
    for pattern, changes in patterns.items():
        names = [s.name for s in shapes if fnmatchcase(s.name, str(pattern))]
        if not names:
            raise _no_linear(where, str(pattern), shapes, model)
        if changes is not None and not isinstance(changes, Mapping):
            raise ConfigError(f"{where}: {pattern!r} is given {changes!r}; give a mapping of changes, or null to leave those linears alone")
        value = None if changes is None else make(changes)
        found.update(dict.fromkeys(names, value))
    return found


def _no_linear(where: str, name: str, shapes: Sequence[LinearShape], model: str) -> PlanError:
    near = difflib.get_close_matches(name, [s.name for s in shapes], n=2, cutoff=0.0)
    return PlanError(f"{where}: {name!r} matches no linear of {model}; linears are named like {' or '.join(near)}")


def check_linears(option: Option, method: MethodSpec, shapes: Sequence[LinearShape], model: str) -> None:
    """Raises PlanError where the rounding's `layer_bits` (names or patterns) or `bit_lists` (names) hold what is no linear."""
    params, known = dict(method.rounding.params), {s.name for s in shapes}
    for key in ("layer_bits", "bit_lists"):
        for name in _names(params.get(key)):
            if name not in known and not (key == "layer_bits" and any(fnmatchcase(n, name) for n in known)):
                raise _no_linear(f"method={option.name}: {key}", name, shapes, model)


def _names(mapping: Any) -> list[str]:
    """Of a mapping in the form of `Params`; a value of another type is the method's to refuse."""
    pairs = mapping if isinstance(mapping, tuple) else ()
    return [pair[0] for pair in pairs if isinstance(pair, tuple) and len(pair) == 2]


def _weight(option: Option, base: WeightScheme, changes: Mapping[str, Any]) -> WeightScheme:
    known = asdict(base)
    for name in changes:
        if name not in known:
            raise ConfigError(f"scheme={option.name}: overrides: {unknown_name('field of weight', str(name), known)}")
    try:
        made: WeightScheme = from_json(WeightScheme, {**to_json(base), **changes})
    except (ValueError, TypeError) as e:
        raise ConfigError(f"scheme={option.name}: overrides: {e}") from e
    return made


def _method(option: Option, base: MethodSpec, changes: Mapping[str, Any]) -> MethodSpec:
    rounding = option.values["rounding"]
    if rounding.get("feeds_text") or rounding.get("toolkit"):
        raise ConfigError(
            f"method={option.name}: overrides: {base.rounding.name} treats linears together, with one set of parameters; "
            "give null to leave linears alone, or overrides of the scheme"
        )
    known = dict(base.rounding.params)
    for name in changes:
        if name not in known:
            raise ConfigError(f"method={option.name}: overrides: {unknown_name(f'parameter of {base.rounding.name}', str(name), known)}")
    return replace(base, rounding=replace(base.rounding, params=freeze({**known, **changes})))
