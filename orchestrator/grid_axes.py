"""Overrides ▸ dimensions ▸ choices: what varies, in Hydra's order, before any option is loaded.

A `Dimension` is what moves together: one swept key, or several zipped ones. A `Choice` says which option of an axis a cell
takes, with its overrides; cells share choice objects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from orchestrator.cell import AXES
from orchestrator.config import NOT_SWEPT
from orchestrator.errors import ConfigError, unknown_name
from orchestrator.hydra_bridge import Composer, as_config_error, first_name, make_override, plain_key, quoted, sweep_values

NAMING = ("model", "method", "scheme", "task")
"""Axes whose options name a sweep that has no name of its own."""


@dataclass(frozen=True)
class Change:
    """One override inside an axis."""

    text: str
    """As typed: `method.rounding.params.damp=0.1`."""
    swept: bool
    override: Override = field(compare=False, repr=False)

    @property
    def is_group(self) -> bool:
        """Chooses a file inside the option: `transform@method.transforms.awq=...`."""
        return self.override.package is not None


@dataclass(frozen=True)
class Choice:
    axis: str
    file: str
    changes: tuple[Change, ...] = ()

    @property
    def name(self) -> str:
        """File name with the swept parameters: `gptq[rounding.params.damp=0.1]`; of a model that is a folder of its own, with that folder's
        name: `opt_125m[path=mine]`, for it is another model than the file's."""
        told = [text for c in self.changes if (text := _inside(c.text, self.axis) if c.swept else _own_folder(c.override))]
        return f"{self.file}[{','.join(told)}]" if told else self.file

    @property
    def lines(self) -> list[str]:
        """For Hydra's own compose."""
        return [f"{self.axis}={self.file}", *(c.text for c in self.changes)]

    @property
    def group_lines(self) -> list[str]:
        """Only what chooses files."""
        return [f"{self.axis}={self.file}", *(c.text for c in self.changes if c.is_group)]


def _own_folder(override: Override) -> str | None:
    path = override.value() if plain_key(override) == "model.path" else None
    return f"path={Path(path).absolute().name}" if isinstance(path, str) else None


def _inside(text: str, axis: str) -> str:
    key, _, value = text.partition("=")
    key = key.lstrip("+~").rpartition("@")[2]
    return f"{key.removeprefix(f'{axis}.')}={value}"


@dataclass(frozen=True)
class Dimension:
    rows: tuple[tuple[Override, ...], ...]
    """Alternatives; overrides of one row move together."""
    swept: bool


def axis_of(override: Override) -> str | None:
    """The axis that an override changes, by its package or first key."""
    name = first_name(override.package if override.package is not None else override.key_or_group)
    return name if name in AXES else None


@dataclass(frozen=True)
class Request:
    """Parsed overrides, sorted by what they change."""

    axes: dict[str, Override]
    """Of the axes, by key, in Hydra's order; the last of equal keys wins."""
    groups: tuple[Override, ...]
    """Choices of settings groups, and Hydra's own settings: passed to the base compose."""
    settings: tuple[Override, ...]
    """Values of settings."""


def read_overrides(composer: Composer, lines: Iterable[str], *, multirun: bool) -> Request:
    """Parse and sort overrides. Raises ConfigError for unknown names, bad grammar, and sweeps where none is possible."""
    axes: dict[str, Override] = {}
    groups: list[Override] = []
    settings: list[Override] = []
    for override in composer.parse(lines):
        root = first_name(override.key_or_group.partition("/")[0])
        if override.is_sweep_override():
            _refuse_bad_sweep(override, root, multirun=multirun)
        if axis_of(override) is not None:
            _check_group(composer, override)
            key = _key(override)
            # As Hydra does it: a sweep keeps the place of the first and the value of the last, a single run applies in order.
            if not multirun:
                axes.pop(key, None)
            axes[key] = override
        elif root == "hydra":
            groups.append(override)
        elif composer.is_group(override.key_or_group) and not isinstance(override.value(), dict):
            _check_group(composer, override)
            groups.append(override)
        else:
            settings.append(override)
    return Request(axes, tuple(groups), tuple(settings))


def _key(override: Override) -> str:
    """`model=tiny` chooses a file, `model={dtype: float16}` changes values: both may be there."""
    return str(override.get_key_element()) + ("={}" if isinstance(override.value(), dict) else "")


def _refuse_bad_sweep(override: Override, root: str, *, multirun: bool) -> None:
    if axis_of(override) is None and root in NOT_SWEPT:
        raise ConfigError(f"{override.input_line}: {root} cannot be swept: {NOT_SWEPT[root]}")
    if not multirun:
        raise ConfigError(
            f"{override.input_line} is a sweep over several values: add -m (bitgrid run -m {override.input_line} ...), "
            "or write key=[a,b] for one value that is a list"
        )
    if axis_of(override) is None:
        raise ConfigError(f"{override.input_line}: {unknown_name('axis', root, AXES)}")


def _check_group(composer: Composer, override: Override) -> None:
    """Options named on the command line must exist."""
    group = override.key_or_group
    if not composer.is_group(group) or (override.package is None and isinstance(override.value(), dict)):
        return
    if group in AXES and override.package is None and (override.is_delete() or override.is_add() or override.is_force_add()):
        raise ConfigError(f"{override.input_line}: every cell has exactly one {group}; write {group}=NAME")
    options = composer.options(group)
    values = sweep_values(override) if override.is_sweep_override() else [override.value()]
    if override.is_sweep_override() and not values:
        raise ConfigError(f"{override.input_line} matches no option of {group}; it has: {', '.join(options)}")
    for value in values:
        text = getattr(value, "text", value)
        if override.is_delete() and text in (None, ""):
            continue
        if isinstance(text, list):
            raise ConfigError(
                f"{override.input_line}: a cell takes one {group}; to sweep, write {group}={','.join(map(str, text))} with -m"
            )
        if str(text) not in options:
            raise ConfigError(unknown_name(group, "null" if text is None else str(text), options))


def dimensions(axes: Mapping[str, Override], varied: Collection[str] = ()) -> list[Dimension]:
    """One dimension per key, swept or fixed. `varied`: keys of one value that count as swept all the same."""
    out = []
    for key, override in axes.items():
        if not override.is_sweep_override():
            out.append(Dimension(((override,),), swept=key in varied))
            continue
        with as_config_error():
            values = sweep_values(override)
        if not values:
            raise ConfigError(f"{override.input_line} gives no value; give one at least, or leave it out")
        path = plain_key(override)
        out.append(Dimension(tuple((make_override(path, v, override.type),) for v in values), swept=True))
    return out


def swept_keys(composer: Composer, lines: Iterable[str]) -> set[str]:
    """Keys of overrides that sweep or search an axis."""
    return {_key(o) for o in composer.parse(lines) if o.is_sweep_override() and axis_of(o) is not None}


def varied_keys(requests: Sequence[Request]) -> set[str]:
    """Keys of axes that differ between requests, or that only some have: what the sweeper behind them swept."""
    keys = {key for r in requests for key in r.axes}
    return {key for key in keys if len({str(r.axes[key].input_line) if key in r.axes else None for r in requests}) > 1}


def common(request: Request, varied: Collection[str] = ()) -> tuple[str, ...]:
    """Overrides that tell a grid from others, but stand in no option's name: of one value, and not of the axes that name a sweep."""
    told = []
    for key, override in request.axes.items():
        in_names = key in NAMING or key in varied or (override.is_sweep_override() and "." in key)
        told += [] if in_names else [str(override.input_line)]
    return (*told, *(str(o.input_line) for o in request.settings if o.key_or_group == "budget"))


def zipped(rows: Mapping[str, Sequence[Any]], fixed: Mapping[str, Override]) -> Dimension:
    """A zip rule as one dimension. Keys given on the command line keep only the rows with those values."""
    keep = {k: {str(v) for v in _values(o)} for k, o in fixed.items() if k in rows}
    kept = []
    for values in zip(*rows.values(), strict=True):
        row = dict(zip(rows, values, strict=True))
        if all(str(row[k]) in allowed for k, allowed in keep.items()):
            kept.append(tuple(make_override(k, quoted(v)) for k, v in row.items()))
    if not kept:
        given = ", ".join(str(fixed[k].input_line) for k in keep)
        raise ConfigError(f"{given} leaves nothing of the zipped axes {', '.join(rows)}; choose from the values in sweep.zip")
    return Dimension(tuple(kept), swept=True)


def _values(override: Override) -> list[Any]:
    values = sweep_values(override) if override.is_sweep_override() else [override.value()]
    return [getattr(v, "text", v) for v in values]


def narrowed(dims: Iterable[Dimension], row_keys: Iterable[str]) -> list[Dimension]:
    """The dimensions that still vary beside an extra row that names `row_keys`.

    An axis named in the row is the row's alone, but keeps the overrides that hold for the whole sweep; an axis of which
    only a parameter is named keeps its options.
    """
    keys = set(row_keys)
    named = {first_name(k.rpartition("@")[2]) for k in keys}
    out = []
    for dim in dims:
        rows = [tuple(o for o in row if _stays(o, keys, named, swept=dim.swept)) for row in dim.rows]
        unique = list({tuple(str(o.input_line) for o in row): row for row in rows if row}.values())
        if unique:
            out.append(Dimension(tuple(unique), dim.swept))
    return out


def _stays(override: Override, keys: set[str], named: set[str], *, swept: bool) -> bool:
    key, axis = plain_key(override), axis_of(override)
    if key in keys:
        return False
    if axis not in named:
        return True
    return (key == axis and axis not in keys) or (key != axis and not swept)


def choices(dims: Sequence[Dimension], defaults: Mapping[str, str]) -> Iterator[tuple[Choice, ...]]:
    """Product of the dimensions, the last varying fastest, as one Choice per axis in the order of AXES."""
    touching = [[d for d, dim in enumerate(dims) if any(axis_of(o) == axis for row in dim.rows for o in row)] for axis in AXES]
    made: list[dict[tuple[int, ...], Choice]] = [{} for _ in AXES]
    for picked in product(*(range(len(d.rows)) for d in dims)):
        cell = []
        for axis, where, known in zip(AXES, touching, made, strict=True):
            key = tuple(picked[d] for d in where)
            if key not in known:
                parts = [(o, dims[d].swept) for d in where for o in dims[d].rows[picked[d]] if axis_of(o) == axis]
                known[key] = _choice(axis, parts, defaults[axis])
            cell.append(known[key])
        yield tuple(cell)


def _choice(axis: str, parts: Iterable[tuple[Override, bool]], default: str) -> Choice:
    file, changes = default, []
    for override, swept in parts:
        if override.key_or_group == axis and override.package is None and not isinstance(override.value(), dict):
            file = str(override.value())
        else:
            changes.append(Change(str(override.input_line), swept, override))
    return Choice(axis, file, tuple(changes))
