"""What to pick: the best at each weight width, and the Pareto front over quality and size.

Chosen is a method with its scheme and calibration, not one of its replicates: whoever runs it again gets another draw. So contenders
are judged by the mean of their replicates, and the intervals of their differences hold how far draws move that mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from orchestrator.errors import PairingError
from orchestrator.report import numbers
from orchestrator.report.overview import Line, ModelTable
from orchestrator.report.tables import CONFIDENCE, Row
from orchestrator.results import TaskInfo
from orchestrator.stats import over_replicates, paired_delta
from workers.artifact import CorruptArtifactError


class Standing(str, Enum):
    FRONT = "on the front"
    CLOSE = "dominated, but not separable from the front"
    DOMINATED = "dominated"


@dataclass(frozen=True)
class Contender:
    """Variants of one model that differ in their replicate alone, with their scores on one task."""

    name: str
    lines: tuple[Line, ...]
    """Those with a score, which may not be finite."""
    asked: int
    """Replicates in the sweep, those without a score included."""
    task: TaskInfo

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(x.cells[self.task.name] for x in self.lines)

    @property
    def values(self) -> list[float]:
        return [r.value for r in self.rows if r.value is not None]

    @property
    def value(self) -> float:
        """Mean over replicates; not finite where one of them is not."""
        return _mean(self.values)

    @property
    def badness(self) -> float:
        """The score with its sign turned so that smaller is better."""
        return -self.value if self.task.higher_is_better.get(self.task.primary) else self.value

    @property
    def size(self) -> float | None:
        """Bytes of the whole model, the mean over replicates; None where not known."""
        sizes = [x.model_bytes for x in self.lines if x.model_bytes is not None]
        return _mean(sizes) if sizes else None

    @property
    def bits_stored(self) -> float | None:
        bits = [x.bits_stored for x in self.lines if x.bits_stored is not None]
        return _mean(bits) if bits else None

    @property
    def difference(self) -> tuple[float, float, float] | None:
        """To the unquantized model, with its interval (NaN: none); None where a replicate has none."""
        known = [(r.delta, _end(r.low), _end(r.high)) for r in self.rows if r.delta is not None]
        return over_replicates(known, self.values, confidence=CONFIDENCE) if len(known) == len(self.lines) else None

    @property
    def replicates(self) -> str:
        """`mean of 3 replicates, 87.2 to 88.0`; empty where there is one."""
        if self.asked == 1:
            return ""
        if len(self.lines) == 1:
            return f"1 of {self.asked} replicates"
        many = f"{self.asked}" if len(self.lines) == self.asked else f"{len(self.lines)} of {self.asked}"
        return f"mean of {many} replicates, {numbers.number(min(self.values), 4)} to {numbers.number(max(self.values), 4)}"


@dataclass(frozen=True)
class Pick:
    best: Contender
    tied: tuple[str, ...]
    """Names of contenders whose difference to it could be chance (its interval holds zero, or there is none: one item, unreadable ones)."""


def contenders(lines: Iterable[Line], task: TaskInfo) -> list[Contender]:
    """Those with a finite score: of all that have one, each must be finite."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if task.name in line.cells:
            groups.setdefault(line.contender, []).append(line)
    found = [Contender(n, tuple(x for x in g if x.cells[task.name].value is not None), len(g), task) for n, g in groups.items()]
    return [c for c in found if c.lines and math.isfinite(c.value)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point (both coordinates: smaller is better) is dominated by no other; equal points stand together."""
    front = [False] * len(points)
    best = math.inf  # over all strictly smaller sizes
    order = sorted(range(len(points)), key=lambda i: points[i])
    start = 0
    while start < len(order):
        size, smallest = points[order[start]]
        stop = start
        while stop < len(order) and points[order[stop]][0] == size:
            front[order[stop]] = points[order[stop]][1] == smallest < best
            stop += 1
        best, start = min(best, smallest), stop
    return front


def standings(table: ModelTable, task: TaskInfo) -> list[tuple[Contender, Standing]]:
    """Every contender with a finite score and a known size, ordered by size."""
    ranked = sorted(((s, c.badness, c) for c in contenders(table.lines, task) if (s := c.size) is not None), key=lambda t: t[:2])
    front = pareto_front([(s, b) for s, b, _ in ranked])
    standing = [r for r, on_front in zip(ranked, front, strict=True) if on_front]
    out = []
    for (size, bad, contender), on_front in zip(ranked, front, strict=True):
        if on_front:
            out.append((contender, Standing.FRONT))
            continue
        better = [c for s, b, c in standing if s <= size and b <= bad]
        close = all(_tied(c, contender) for c in better)
        out.append((contender, Standing.CLOSE if close else Standing.DOMINATED))
    return out


def best_per_width(table: ModelTable) -> dict[float, dict[str, Pick]]:
    """Weight width (nominal bits, widest first) ▸ task ▸ the best quantized contender of that width."""
    bits: dict[str, list[float]] = {}
    for line in table.quantized:
        if line.bits_nominal is not None:
            bits.setdefault(line.contender, []).append(line.bits_nominal)
    width_of = {name: _mean(found) for name, found in bits.items()}  # chosen bits may differ from draw to draw
    lines: dict[float, list[Line]] = {}
    for line in table.quantized:
        if line.contender in width_of:
            lines.setdefault(width_of[line.contender], []).append(line)
    out: dict[float, dict[str, Pick]] = {}
    for width in sorted(lines, reverse=True):
        for task in table.tasks:
            scored = contenders(lines[width], task)
            if not scored:
                continue
            best = min(scored, key=lambda c: c.badness)
            out.setdefault(width, {})[task.name] = Pick(best, tuple(c.name for c in scored if c is not best and _tied(best, c)))
    return out


def _tied(a: Contender, b: Contender) -> bool:
    """Whether the interval of the difference of two contenders holds zero, or nothing tells how wide it is."""
    name, metric = a.task.name, a.task.primary
    pairs = [(x.variant.evaluations[name], y.variant.evaluations[name]) for x in a.lines for y in b.lines]
    try:
        found = [paired_delta(y, x, a.task, metric, confidence=CONFIDENCE) for x, y in pairs]
    except (PairingError, CorruptArtifactError):
        return True
    _, low, high = over_replicates([(d.delta, d.low, d.high) for d in found], a.values, b.values, confidence=CONFIDENCE)
    return not (low > 0 or high < 0)  # NaN, of a single item, tells nothing apart


def _end(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    """That of equal values is the value itself, which the quotient of a sum may miss."""
    return values[0] + sum(v - values[0] for v in values) / len(values)
