"""A composed grid, before planning: options, cells and the settings that belong to the sweep.

An `Option` is one file of a config group with its overrides applied; cells share option objects, so a grid of many
thousand cells costs one tuple each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

AXES = ("model", "method", "scheme", "calibration", "task", "replicate")


@dataclass(frozen=True, eq=False)
class Option:
    """One value of an axis. Compared by identity: the grid makes one object per distinct value."""

    axis: str
    name: str
    """File name of the option, with swept parameters appended: `gptq[rounding.params.damp=0.1]`."""
    values: Mapping[str, Any]
    """Plain, resolved values of the group (dicts, lists, numbers, strings)."""

    @property
    def file(self) -> str:
        """The name without swept parameters: what folders of models and texts are named by."""
        return self.name.partition("[")[0]


class Cell(NamedTuple):
    """One grid point."""

    model: Option
    method: Option
    scheme: Option
    calibration: Option
    task: Option
    replicate: Option

    def names(self) -> dict[str, str]:
        return {o.axis: o.name for o in self}


@dataclass(frozen=True)
class Grid:
    """All cells of a sweep, in sweep order, and its settings."""

    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]
    """The composed root config without the axes: sweep, store, models_dir, data_dir, cluster, tracking, hints."""
    excluded: tuple[tuple[Cell, str], ...] = ()
    """Cells a rule of the sweep removed, with the rule."""
    notes: tuple[str, ...] = ()
    """Said in the plan: why Hydra's own compose was used, for example."""
    common: tuple[str, ...] = ()
    """Overrides that hold for all cells and stand in no option's name, and choices that a sweep is not named by: as they were given."""
