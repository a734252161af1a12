"""The method × scheme heat map: what each method loses at each width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.report import numbers
from orchestrator.report.markup import Markup, Td, table
from orchestrator.report.overview import FAILED_STATES, Line, ModelTable, state_word
from orchestrator.report.tables import Row
from orchestrator.results import TaskInfo

RAMP = ((255, 247, 224), (254, 217, 118), (244, 140, 50), (197, 64, 18), (110, 20, 10))
"""From no loss to the largest: lightness falls all the way, so it reads in grey and with any colour vision."""


@dataclass(frozen=True)
class HeatCell:
    rows: tuple[Row, ...]
    """Replicates of one method and scheme."""

    @property
    def losses(self) -> list[float]:
        return [r.loss for r in self.rows if r.loss is not None and math.isfinite(r.loss)]

    @property
    def loss(self) -> float | None:
        """Mean over replicates; None where there is nothing to compare."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    @property
    def delta(self) -> float | None:
        deltas = [r.delta for r in self.rows if r.delta is not None]
        return sum(deltas) / len(deltas) if deltas else None


def heat_cells(model: ModelTable, task: TaskInfo) -> tuple[list[str], list[str], dict[tuple[str, str], HeatCell]]:
    """Row names (methods), column names (schemes, widest first) and the cells that were asked for."""
    of_scheme: dict[str, list[Line]] = {}
    for line in model.quantized:
        of_scheme.setdefault(line.scheme, []).append(line)
    schemes = sorted(of_scheme, key=lambda s: _width(of_scheme[s], s))
    several = len({x.variant.axes.get("calibration") for x in model.quantized}) > 1
    groups: dict[tuple[str, str], list[Row]] = {}
    for line in model.quantized:
        name = f"{line.method} · {line.variant.axes.get('calibration', '')}" if several else line.method
        if task.name in line.cells:
            groups.setdefault((name, line.scheme), []).append(line.cells[task.name])
    cells = {place: HeatCell(tuple(rows)) for place, rows in groups.items()}
    asked = {scheme for _, scheme in cells}
    return list(dict.fromkeys(m for m, _ in cells)), [s for s in schemes if s in asked], cells


def heat_map(model: ModelTable, task: TaskInfo) -> Markup:
    methods, schemes, cells = heat_cells(model, task)
    scale = _scale([c.loss for c in cells.values() if c.loss is not None])
    rows = [[Td(m), *(_cell(cells.get((m, s)), scale) for s in schemes)] for m in methods]
    return table(["method", *schemes], rows, label=f"{model.model}, {task.name}: methods by schemes", class_="heat")


def _width(lines: Sequence[Line], scheme: str) -> tuple[float, float, str]:
    nominal, stored = ([v for x in lines if (v := getattr(x, name)) is not None] for name in ("bits_nominal", "bits_stored"))
    return (-max(nominal, default=0.0), -max(stored, default=0.0), scheme)


def _cell(cell: HeatCell | None, scale: tuple[float, float]) -> Td:
    if cell is None:
        return Td("–", sort="", class_="state", title="not in the grid, or skipped")
    if cell.loss is None or cell.delta is None:
        row = cell.rows[0]
        failed = row.status in FAILED_STATES
        word = state_word(row) if row.value is None else numbers.number(row.value)
        return Td(word, sort="", class_="bad" if failed else "state", title=row.reason)
    first = cell.rows[0]
    low, high = (x if x is not None and len(cell.rows) == 1 else math.nan for x in (first.low, first.high))
    places = numbers.decimals_for(cell.delta, low, high)
    left_out = f" of {len(cell.rows)}" if len(cell.losses) < len(cell.rows) else ""
    what = f"mean of {len(cell.losses)}{left_out} replicates" if len(cell.rows) > 1 else f"{numbers.number(first.value)}"
    hint = f"{what}, difference {numbers.signed(cell.delta, places)} {numbers.interval(low, high, places)}".strip()
    data = (("delta", repr(cell.delta)),)
    return Td(
        numbers.signed(cell.delta, places), sort=repr(cell.loss), class_="shade", title=hint, style=_colours(cell.loss, scale), data=data
    )


def _scale(losses: Sequence[float]) -> tuple[float, float]:
    """(knee, largest) loss: colours are linear below the knee, the median loss, and logarithmic above it."""
    positive = sorted(x for x in losses if x > 0)
    return (positive[len(positive) // 2], positive[-1]) if positive else (1.0, 1.0)


def _colours(loss: float, scale: tuple[float, float]) -> str:
    knee, largest = scale
    share = math.asinh(max(0.0, loss) / knee) / math.asinh(largest / knee)
    at = min(share, 1.0) * (len(RAMP) - 1)
    i = min(int(at), len(RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (at - i)) for a, b in zip(RAMP[i], RAMP[i + 1], strict=True))
    dark = 0.2126 * _linear(red) + 0.7152 * _linear(green) + 0.0722 * _linear(blue) > 0.18  # where black reads better than white (WCAG)
    return f"background:#{red:02x}{green:02x}{blue:02x};color:{'#111' if dark else '#fff'}"


def _linear(channel: int) -> float:
    c = channel / 255
    return c / 12.92 if c <= 0.04045 else float(((c + 0.055) / 1.055) ** 2.4)
