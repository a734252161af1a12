"""What to pick: the best variant at each weight width, and the Pareto front over quality and size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from orchestrator.errors import PairingError
from orchestrator.report.overview import Line, ModelTable
from orchestrator.report.tables import CONFIDENCE, Row
from orchestrator.results import TaskInfo
from orchestrator.stats import paired_delta
from workers.artifact import CorruptArtifactError


class Standing(str, Enum):
    FRONT = "on the front"
    CLOSE = "dominated, but not separable from the front"
    DOMINATED = "dominated"


@dataclass(frozen=True)
class Pick:
    line: Line
    row: Row
    tied: tuple[str, ...]
    """Names of variants whose difference to it could be chance (their paired interval holds zero, or there is none: one item)."""


def badness(row: Row | None) -> float | None:
    """The score with its sign turned so that smaller is better; None where there is no finite score."""
    if row is None or row.value is None or not math.isfinite(row.value):
        return None
    return -row.value if row.higher_is_better else row.value


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


def standings(table: ModelTable, task: TaskInfo) -> list[tuple[Line, Standing]]:
    """Every variant with a finite score and a known size, ordered by size."""
    known = [(x, x.model_bytes, badness(x.cells.get(task.name))) for x in table.lines]
    lines = sorted(((x, s, b) for x, s, b in known if s is not None and b is not None), key=lambda t: (t[1], t[2]))
    front = pareto_front([(s, b) for _, s, b in lines])
    out = []
    for (line, size, bad), on_front in zip(lines, front, strict=True):
        if on_front:
            out.append((line, Standing.FRONT))
            continue
        better = [x for (x, s, b), f in zip(lines, front, strict=True) if f and s <= size and b <= bad]
        close = all(_tied(x, line, task) for x in better)
        out.append((line, Standing.CLOSE if close else Standing.DOMINATED))
    return out


def best_per_width(table: ModelTable) -> dict[float, dict[str, Pick]]:
    """Weight width (nominal bits, widest first) ▸ task ▸ the best quantized variant of that width."""
    widths = sorted({x.bits_nominal for x in table.quantized if x.bits_nominal is not None}, reverse=True)
    out: dict[float, dict[str, Pick]] = {}
    for width in widths:
        for task in table.tasks:
            scored = [(b, x) for x in table.quantized if x.bits_nominal == width and (b := badness(x.cells.get(task.name))) is not None]
            if not scored:
                continue
            best = min(scored, key=lambda s: s[0])[1]
            tied = tuple(x.name for _, x in scored if x is not best and _tied(best, x, task))
            out.setdefault(width, {})[task.name] = Pick(best, best.cells[task.name], tied)
    return out


def _tied(a: Line, b: Line, task: TaskInfo) -> bool:
    """Whether the paired interval of the difference of two variants holds zero, or nothing tells how wide it is."""
    try:
        d = paired_delta(b.variant.evaluations[task.name], a.variant.evaluations[task.name], task, task.primary, confidence=CONFIDENCE)
    except (PairingError, CorruptArtifactError):
        return False
    return not (d.low > 0 or d.high < 0)  # NaN, of a single item, tells nothing apart
