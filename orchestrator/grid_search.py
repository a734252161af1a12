"""A search's settings and space, looked at before its first trial: what is wrong in every trial, or would choose by a wrong score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from orchestrator.cell import Cell
from orchestrator.errors import ConfigError, unknown_name
from orchestrator.grid_axes import Choice, axis_of, choices, dimensions
from orchestrator.hydra_bridge import make_override, plain_key, sweep_values

Row = tuple[Choice, ...]


def check_search(config: DictConfig, axes: Mapping[str, Override], defaults: Mapping[str, str], compose: Callable[[Row], Cell]) -> None:
    """`config`: the composed root, Hydra's node included. `axes`: what is given and searched. Raises ConfigError."""
    for override in axes.values():
        if override.is_sweep_override() and axis_of(override) == "task":
            raise ConfigError(
                f"{override.input_line}: a search goes by one score, and those of different tasks do not compare; give one value, "
                "and run the cells that it finds on the others"
            )
    searched = {k for k, o in axes.items() if o.is_sweep_override()}
    cell = _composed(choices(dimensions({k: _settled(o) for k, o in axes.items()}, searched), defaults), compose)
    _check_direction(OmegaConf.select(config, "hydra.sweeper.direction"), cell)


def _settled(override: Override) -> Override:
    """One value in place of what is searched inside an option: of an interval the middle, since its ends may be open."""
    if not override.is_sweep_override() or (override.is_discrete_sweep() and "." not in plain_key(override)):
        return override
    if override.is_discrete_sweep():
        values = sweep_values(override)
        return make_override(plain_key(override), values[0], override.type) if values else override
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    assert interval.start is not None
    assert interval.end is not None
    both = interval.start + interval.end
    return make_override(plain_key(override), both // 2 if isinstance(both, int) else both / 2, override.type)


def _composed(rows: Iterator[Row], compose: Callable[[Row], Cell]) -> Cell:
    """The first that composes: what is searched may be a parameter of some options only. Else the first one's error."""
    first: ConfigError | None = None
    for row in rows:
        try:
            return compose(row)
        except ConfigError as error:
            first = first or error
    raise ConfigError(
        f"no cell of the search can be composed: {first}; of intervals the middle was tried, int(interval(2,8)) has whole numbers"
    )


def _check_direction(direction: Any, cell: Cell) -> None:
    """As Optuna's sweeper has it; without one, the sweeper's settings are its own matter."""
    if direction is None:
        return
    asked = [str(getattr(d, "name", d)) for d in (direction if isinstance(direction, ListConfig) else [direction])]
    told, primary = f"hydra.sweeper.direction={','.join(asked)}", cell.task.values["primary"]
    if len(asked) != 1:
        raise ConfigError(f"{told}: a trial has one score, {primary} of {cell.task.name}; give one direction")
    higher = cell.task.values["metrics"][primary]["higher_is_better"]
    better = "maximize" if higher else "minimize"
    if asked[0] not in ("minimize", "maximize"):
        raise ConfigError(unknown_name("hydra.sweeper.direction", asked[0], ("minimize", "maximize")))
    if asked[0] != better:
        level = "higher" if higher else "lower"
        raise ConfigError(f"{told} would look for the worst cell: {level} {primary} of {cell.task.name} is better; give {better}")
