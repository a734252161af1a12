"""Site statistics in the report: kurtosis and absmax / σ of inputs, weights, keys and values, where the sweep collected them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.parts import SITE_STATISTICS
from orchestrator.report import numbers
from orchestrator.report.markup import Markup, Td, details, join, table, tag
from orchestrator.report.overview import ModelTable
from orchestrator.report.plot import COLOURS, Figure, choose_scale, plot_layout, safe, scatter, short
from orchestrator.report.sections import figure
from orchestrator.results import StageResult, SweepResult
from workers.artifact import CorruptArtifactError, payload_path

COLUMNS = {"kurtosis": "kurtosis", "absmax_sigma": "absmax / σ"}
TITLES = {"kurtosis": "Kurtosis per block", "absmax_sigma": "Largest value over σ per block"}
LOOKS = {"input": "solid", "weight": "dot", "keys": "dash", "values": "dashdot"}


@dataclass(frozen=True)
class Series:
    """One kind of tensor over all blocks, and over experts where it has some."""

    kind: str
    name: str
    rows: tuple[dict[str, Any], ...]

    def known(self, column: str) -> list[tuple[float, dict[str, Any]]]:
        """Values with their rows, where the tensor had a spread."""
        return [(r[column], r) for r in self.rows if r[column] is not None]

    def by_block(self, column: str) -> dict[int, tuple[float, dict[str, Any]]]:
        """The largest of each block."""
        found: dict[int, tuple[float, dict[str, Any]]] = {}
        for value, row in self.known(column):
            if row["block"] not in found or value > found[row["block"]][0]:
                found[row["block"]] = (value, row)
        return dict(sorted(found.items()))


def site_section(result: SweepResult, model: ModelTable, number: int) -> Markup:
    """Empty where the sweep has no site statistics of the model, or none that can be read."""
    found = [(s, series) for s in _stages(result, model) if (series := read_series(s))]
    if not found:
        return Markup("")
    (stage, first), *others = found
    parts: list[object] = [
        tag("h3", "What the tensors look like"),
        tag(
            "p",
            f"The unquantized model on {stage.summary.get('tokens', '–')} tokens of {_draw(stage, model)}. Kurtosis is 3 for a normal "
            "distribution; absmax / σ is how far one scale for the whole tensor must reach. Median over blocks, and the largest with its "
            "block.",
            class_="caption",
        ),
        site_table(first, f"{model.model}: site statistics"),
        tag("div", *(figure(f) for c in COLUMNS if (f := site_figure(first, c, number)) is not None), class_="grid"),
    ]
    for stage, series in others:
        draw = _draw(stage, model)
        parts.append(details(f"On another calibration draw: {draw}", site_table(series, f"{model.model}: site statistics, {draw}")))
    return join(parts, "\n")


def _stages(result: SweepResult, model: ModelTable) -> list[StageResult]:
    models = [e.spec.get("model") for x in model.lines for e in x.variant.evaluations.values()]
    return [
        s
        for s in result.stages.values()
        if s.kind == "calibrate" and s.spec.get("statistic") == SITE_STATISTICS and s.spec.get("model") in models
    ]


def _draw(stage: StageResult, model: ModelTable) -> str:
    name = stage.label.removeprefix(f"calibrate {model.model} ").removesuffix(f" {SITE_STATISTICS}")
    return f"{name}, seed {stage.spec.get('calibration', {}).get('seed', 0)}"


def read_series(stage: StageResult) -> list[Series]:
    """What a calibrate stage found, in model order: inputs, weights, keys, values. Empty where it has not run."""
    if stage.payload is None:
        return []
    import pyarrow.parquet as pq

    try:
        path = payload_path(Path(stage.payload).parent, "moments.parquet")
    except CorruptArtifactError:
        return []  # the next run sets it aside and makes it again
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in pq.ParquetFile(path).read(use_threads=False).to_pylist():
        groups.setdefault((row["kind"], _name(row)), []).append(row)
    order = list(LOOKS)
    return sorted((Series(kind, name, tuple(rows)) for (kind, name), rows in groups.items()), key=lambda s: order.index(s.kind))


def _name(row: dict[str, Any]) -> str:
    if row["kind"] in ("keys", "values"):
        return str(row["kind"])
    first, *others = (re.sub(r"\.\d+$", ".*", n) for n in (row["linears"] or row["site"]).split(", "))
    parent = first.rpartition(".")[0] + "."
    return f"{row['kind']} of " + ", ".join([first, *(n.removeprefix(parent) for n in others)])


def site_table(series: Sequence[Series], label: str) -> Markup:
    heads = [join((name, tag("small", what))) for name in COLUMNS.values() for what in ("median", "largest")]
    rows = [[Td(s.name), *(cell for column in COLUMNS for cell in _cells(s, column))] for s in series]
    return table(["tensor", *heads], rows, label=label)


def _cells(series: Series, column: str) -> tuple[Td, Td]:
    known = series.known(column)
    if not known:
        why = "no value reached it, or all were equal"
        return Td("–", sort="", title=why), Td("–", sort="", title=why)
    middle = median(v for v, _ in known)
    largest, row = max(known, key=lambda k: k[0])
    worst = tag("span", _place(row), class_="delta")
    exact = ((column.replace("_", "-"), repr(largest)),)
    return (
        Td(numbers.number(middle), sort=repr(middle)),
        Td(join((numbers.number(largest), worst)), sort=repr(largest), title=row["module"], data=exact),
    )


def _place(row: dict[str, Any]) -> str:
    expert = re.search(r"\.(\d+)$", row["site"])
    return f"block {row['block']}" + (f", expert {expert[1]}" if expert else "")


def site_figure(series: Sequence[Series], column: str, number: int) -> Figure | None:
    """Every kind of tensor over the blocks; of several experts the largest."""
    data, values, blocks = [], [], {0}
    place: dict[str, int] = {}
    for s in series:
        found = s.by_block(column)
        i = place[s.kind] = place.get(s.kind, -1) + 1
        if not found:
            continue
        colour = COLOURS[(i + 4 * (s.kind == "keys") + 5 * (s.kind == "values")) % len(COLOURS)]
        hidden = s.kind == "weight"
        data.append(
            scatter(
                list(found),
                [short(v) for v, _ in found.values()],
                s.name,
                mode="lines+markers",
                line={"color": colour, "width": 1.5, "dash": LOOKS[s.kind]},
                marker={"size": 4, "color": colour},
                hovertext=[f"{safe(s.name)}<br>{safe(r['module'])}: {numbers.number(v)}" for v, r in found.values()],
                visible="legendonly" if hidden else True,
            )
        )
        blocks |= set(found)
        values += [] if hidden else [v for v, _ in found.values()]
    if not data:
        return None
    layout = plot_layout("decoder block", COLUMNS[column])
    layout["xaxis"] |= {"tick0": 0, "dtick": max(1, (max(blocks) + 1) // 16), "zeroline": False}
    choose_scale(layout, values)
    caption = "One line per kind of tensor. Weights are hidden at first; tap a name in the legend to show or hide one."
    return Figure(f"site-{column.replace('_', '-')}-{number}", TITLES[column], caption, {"data": data, "layout": layout})
