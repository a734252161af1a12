"""Rules of a named sweep (`sweep.exclude`, `sweep.only_if`, `sweep.zip`, `sweep.extra`), as in conf/sweep/none.yaml.

A rule names axes, or keys inside them (`method.rounding.params.damp`). Values are option names, globs, or lists of them. A
name that does not exist is an error, and so is a rule that no cell matches, a key that no option has, or a `then` that keeps no
cell, unless the command line narrowed its axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from orchestrator.cell import AXES, Cell, Option
from orchestrator.config import SWEEP_KEYS
from orchestrator.errors import ConfigError, unknown_name
from orchestrator.grid_axes import Dimension
from orchestrator.hydra_bridge import Composer, first_name, make_override, override_text, quoted

_ABSENT = object()


@dataclass(frozen=True)
class Match:
    """A row of a rule: every key must have one of its values."""

    allowed: tuple[tuple[str, tuple[Any, ...]], ...]

    def __call__(self, cell: Cell) -> bool:
        return all(any(_fits(cell, key, value) for value in values) for key, values in self.allowed)

    @property
    def axes(self) -> set[str]:
        return {first_name(key) for key, _ in self.allowed}

    def __str__(self) -> str:
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in self.allowed) + "}"


def _text(values: Sequence[Any]) -> str:
    return override_text(values[0]) if len(values) == 1 else override_text(list(values))


def _fits(cell: Cell, key: str, value: Any) -> bool:
    axis, *path = key.split(".")
    option: Option = getattr(cell, axis)
    if not path:
        return option.name == value or fnmatchcase(option.file, str(value))
    found: Any = option.values
    for part in path:
        found = found.get(part, _ABSENT) if isinstance(found, Mapping) else _ABSENT
    if isinstance(value, str) and isinstance(found, str):
        return fnmatchcase(found, value)
    # 0 and false are equal in Python, but not in a configuration.
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)


@dataclass(frozen=True)
class OnlyIf:
    condition: Match
    then: Match


@dataclass(frozen=True)
class Rules:
    exclude: tuple[Match, ...]
    only_if: tuple[OnlyIf, ...]
    zips: tuple[dict[str, list[Any]], ...]
    extra: tuple[dict[str, list[Any]], ...]
    """Rows with every value expanded to a list: globs replaced by the options they match."""


def read_rules(composer: Composer, sweep: Mapping[str, Any]) -> Rules:
    """The rules of a resolved `sweep` node. Raises ConfigError for wrong shapes and unknown names."""
    for key in sweep:
        if key not in SWEEP_KEYS:
            raise ConfigError(unknown_name("key of sweep", str(key), SWEEP_KEYS))
    return Rules(
        exclude=tuple(_match(composer, row, "sweep.exclude") for row in _rows(sweep, "exclude")),
        only_if=tuple(_only_if(composer, row) for row in _rows(sweep, "only_if")),
        zips=tuple(_zip(composer, row) for row in _rows(sweep, "zip")),
        extra=tuple(_extra(composer, row) for row in _rows(sweep, "extra")),
    )


def _rows(sweep: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = sweep.get(key) or []
    if not isinstance(rows, list) or not all(isinstance(r, Mapping) and r for r in rows):
        raise ConfigError(f"sweep.{key} is {rows!r}; expected a list of mappings, as in conf/sweep/none.yaml")
    return rows


def _match(composer: Composer, row: Mapping[str, Any], where: str) -> Match:
    for key in row:
        if "@" in str(key):
            raise ConfigError(f"{where}: {key} chooses a file; name values inside options instead, as method.transforms.awq.kind")
    return Match(tuple((key, tuple(_checked(composer, where, str(key), value))) for key, value in row.items()))


def _checked(composer: Composer, where: str, key: str, value: Any) -> list[Any]:
    """The row's values as a list, after checking that axis and options exist."""
    axis = first_name(key.rpartition("@")[2])
    if axis not in AXES:
        raise ConfigError(f"{where}: {unknown_name('axis', axis, AXES)}")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ConfigError(f"{where}: {key} has an empty list; name at least one value")
    if key == axis:
        options = composer.options(axis)
        for v in values:
            file = str(v).partition("[")[0] if str(v).endswith("]") else str(v)
            if not any(fnmatchcase(name, file) for name in options):
                raise ConfigError(f"{where}: {unknown_name(axis, str(v), options)}")
    return values


def _only_if(composer: Composer, row: Mapping[str, Any]) -> OnlyIf:
    if set(row) != {"if", "then"} or not all(isinstance(row[k], Mapping) and row[k] for k in ("if", "then")):
        raise ConfigError(f"sweep.only_if: got {dict(row)!r}; expected {{if: {{AXIS: VALUE}}, then: {{AXIS: VALUES}}}}")
    return OnlyIf(_match(composer, row["if"], "sweep.only_if"), _match(composer, row["then"], "sweep.only_if"))


def _zip(composer: Composer, row: Mapping[str, Any]) -> dict[str, list[Any]]:
    for key, value in row.items():
        if not isinstance(value, list):
            raise ConfigError(f"sweep.zip: {key} is {value!r}; expected a list, one value per step")
        for name in _checked(composer, "sweep.zip", str(key), value):
            if key in AXES and name not in composer.options(key):
                raise ConfigError(f"sweep.zip: {unknown_name(str(key), str(name), composer.options(key))}; globs have no order to zip")
    lengths = {str(k): len(v) for k, v in row.items()}
    if len(row) < 2 or len(set(lengths.values())) != 1:
        raise ConfigError(f"sweep.zip: zips two or more keys of the same length, got {lengths}; give each key one value per step")
    return {str(k): list(v) for k, v in row.items()}


def _extra(composer: Composer, row: Mapping[str, Any]) -> dict[str, list[Any]]:
    out = {}
    for key, value in row.items():
        values = _checked(composer, "sweep.extra", str(key), value)
        if key in AXES:
            options = composer.options(key)
            values = [name for v in values for name in options if fnmatchcase(name, str(v))]
        out[str(key)] = values
    return out


def extra_dimensions(row: Mapping[str, Sequence[Any]]) -> list[Dimension]:
    return [Dimension(tuple((make_override(key, quoted(v)),) for v in values), swept=True) for key, values in row.items()]


def unzipped_conflicts(zips: Iterable[Mapping[str, Any]]) -> None:
    """No key may be in two zips."""
    seen: set[str] = set()
    for key in (k for row in zips for k in row):
        if key in seen:
            raise ConfigError(f"sweep.zip: {key} is in two rows; write one row with all keys that move together")
        seen.add(key)


def apply_rules(rules: Rules, cells: Sequence[Cell], narrowed_axes: set[str]) -> tuple[list[Cell], list[tuple[Cell, str]], list[str]]:
    """Cells kept, cells removed with their rule, and notes about rules that the command line made idle.

    A rule that no cell matches, and a `then` that keeps none, is a ConfigError, unless one of its axes is in `narrowed_axes`.
    """
    _check_keys(rules, cells, narrowed_axes)
    used: set[int] = set()
    kept, removed = [], []
    for cell in cells:
        reason = None
        for rule in rules.exclude:
            if rule(cell):
                used.add(id(rule))
                reason = reason or f"sweep.exclude {rule}"
        for limit in rules.only_if:
            if limit.condition(cell):
                used.add(id(limit))
                if limit.then(cell):
                    used.add(id(limit.then))
                else:
                    reason = reason or f"sweep.only_if {limit.condition} then {limit.then}"
        kept.append(cell) if reason is None else removed.append((cell, reason))
    notes = []
    conditions = [(r, r, "sweep.exclude") for r in rules.exclude] + [(o, o.condition, "sweep.only_if") for o in rules.only_if]
    for rule_object, match, where in conditions:
        if id(rule_object) in used:
            continue
        if not match.axes & narrowed_axes:
            cells_have = "; ".join(f"{a}: {', '.join(sorted({getattr(c, a).name for c in cells}))}" for a in AXES if a in match.axes)
            raise ConfigError(f"{where} {match} matches no cell of the grid, which has {cells_have}; correct or remove the rule")
        notes.append(f"{where} {match} matches no cell: the command line narrowed the grid")
    for limit in rules.only_if:
        if id(limit) not in used or id(limit.then) in used:
            continue
        told = f"sweep.only_if {limit.condition} then {limit.then} keeps no cell"
        if not (limit.condition.axes | limit.then.axes) & narrowed_axes:
            raise ConfigError(f"{told}: all that match its condition would go; correct `then`, or write sweep.exclude")
        notes.append(f"{told}: the command line narrowed the grid")
    return kept, removed, notes


def _check_keys(rules: Rules, cells: Sequence[Cell], narrowed_axes: set[str]) -> None:
    """A key inside an axis must be in some option of the grid; where the command line narrowed the axis, it may be in none."""
    found = [("sweep.exclude", r) for r in rules.exclude]
    found += [("sweep.only_if", m) for o in rules.only_if for m in (o.condition, o.then)]
    for where, key in ((where, key) for where, match in found for key, _ in match.allowed):
        axis, *path = key.split(".")
        if not path or axis in narrowed_axes:
            continue
        level: list[Any] = [o.values for o in dict.fromkeys(getattr(c, axis) for c in cells)]
        for depth, part in enumerate(path):
            mappings = [v for v in level if isinstance(v, Mapping)]
            level = [m[part] for m in mappings if part in m]
            if not level:
                above = ".".join([axis, *path[:depth]])
                raise ConfigError(f"{where}: {unknown_name(f'key of {above}', part, {str(k) for m in mappings for k in m})}")
