"""The figures of a report, as Plotly specifications `{data, layout}` of plain JSON values.

Nothing is drawn for a score that is not finite, or without a size to draw it at; the caption says how many were left out and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.report import numbers
from orchestrator.report.choices import Contender, Standing, standings
from orchestrator.report.overview import Line, ModelTable
from orchestrator.report.plot import COLOURS, DASHES, GREY, Figure, choose_scale, is_wide, log_axis, plot_layout, safe, scatter, short
from orchestrator.report.tables import Row
from orchestrator.results import StageResult, TaskInfo
from workers.artifact import CorruptArtifactError, payload_path

Point = tuple[Line, float, float]
"""A variant, its stored bits and its score."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
UNITS = {"kl": "nats per token", "nll": "nats per token", "top1_agreement": "share of tokens", "flips": "share of tokens"}
NAMES = {"ppl": "perplexity", "kl": "KL divergence", "nll": "negative log-likelihood", "top1_agreement": "top-1 agreement"}
LAYER_AXES = {
    "weight_error": "‖W′ − W‖ / ‖W‖",
    "output_error": "tr(E H Eᵀ) / tr(W H Wᵀ)",
}
"""E = W′ − W; H = the Hessian of the layer's calibration inputs."""


def metric_name(metric: str) -> str:
    return NAMES.get(metric, metric)


def metric_axis(metric: str) -> str:
    return f"{metric_name(metric)} ({UNITS[metric]})" if metric in UNITS else metric_name(metric)


def method_colours(tables: Sequence[ModelTable]) -> dict[str, str]:
    """Method ▸ colour, the same in every figure."""
    methods = dict.fromkeys(x.method for t in tables for x in t.quantized)
    return {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(methods)}


def quality_over_bits(table: ModelTable, task: TaskInfo, colours: dict[str, str], number: int) -> Figure | None:
    """The headline score against stored bits: one line per method (and family), through the mean of replicates."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    scoreless = unquantized = 0
    for line in table.quantized:
        row = line.cells.get(task.name)
        if row is None:
            continue
        if line.variant.quantize is None:
            unquantized += 1
            continue
        if row.value is None or line.bits_stored is None or not math.isfinite(row.value):
            scoreless += 1
            continue
        groups.setdefault((line.method, line.family, line.variant.axes.get("calibration", "")), []).append(
            (line, line.bits_stored, row.value)
        )
    if not groups:
        return None
    families = list(dict.fromkeys(f for _, f, _ in groups))
    calibrations = list(dict.fromkeys(c for _, _, c in groups))
    data: list[dict[str, Any]] = []
    for (method, family, calibration), points in groups.items():
        name = " · ".join((method, *([family] * (len(families) > 1)), *([calibration] * (len(calibrations) > 1))))
        style = {
            "legendgroup": name,
            "line": {"color": colours[method], "width": 2, "dash": DASHES[families.index(family) % len(DASHES)]},
            "marker": {"color": colours[method], "size": 8, "symbol": SYMBOLS[calibrations.index(calibration) % len(SYMBOLS)]},
        }
        data += _traces(name, points, task, style)
    layout = plot_layout("stored bits per weight", metric_axis(task.primary))
    base = table.baseline.cells.get(task.name) if table.baseline else None
    values = [y for points in groups.values() for _, _, y in points]
    caption = "One line per method; points are schemes, bars the 95 % interval of the difference to the unquantized model."
    if base is not None and base.value is not None and math.isfinite(base.value) and base.value != 0:
        values.append(base.value)
        _baseline_line(layout, base.value)
        caption += " Dashed: unquantized."
    choose_scale(layout, values)
    better = "Higher" if task.higher_is_better.get(task.primary) else "Lower"
    return Figure(
        f"bits-{number}",
        f"{task.name}: {metric_name(task.primary)} against stored bits",
        _left_out(f"{caption} {better} is better.", scoreless, unquantized),
        {"data": data, "layout": layout},
    )


def pareto(table: ModelTable, task: TaskInfo, colours: dict[str, str], number: int) -> Figure | None:
    """The headline score against the size of the whole model, the front joined, dominated variants grey."""
    ranked = standings(table, task)
    if not ranked:
        return None
    caption = (
        "Full points form the front: nothing smaller scores as well. Open points are beaten, but by no more than chance "
        "(the paired 95 % interval holds zero). Grey crosses are beaten."
    )
    if any(c.asked > 1 for c, _ in ranked):
        caption += " Replicates are one point, their mean; whether it is beaten beyond chance counts how far they differ."
    if not any(_is_baseline(c) for c, _ in ranked):
        caption += " The unquantized model is not drawn: it has no score or no known size."
    values = [c.value for c, _ in ranked if not _is_baseline(c)]
    if is_wide(values) and any(c.value <= 0 for c, _ in ranked):
        ranked = [(c, s) for c, s in ranked if not _is_baseline(c)]
        caption += " The unquantized model, 0 by definition, has no place on the logarithmic axis."
    divisor, unit = numbers.size_unit(max(c.size or 0 for c, _ in ranked))
    front = [c for c, s in ranked if s is Standing.FRONT]
    data = [
        scatter(
            [(c.size or 0) / divisor for c in front],
            [c.value for c in front],
            "front",
            mode="lines",
            line={"color": GREY, "width": 2, "shape": "hv"},
            hoverinfo="skip",
            showlegend=False,
        )
    ]
    looks: dict[Standing, Callable[[str], dict[str, Any]]] = {
        Standing.DOMINATED: lambda _: {"color": GREY, "size": 8, "symbol": "x-thin", "line": {"color": GREY, "width": 2}},
        Standing.CLOSE: lambda m: {"color": _colour(colours, m), "size": 10, "symbol": "circle-open", "line": {"width": 2}},
        Standing.FRONT: lambda m: {"color": _colour(colours, m), "size": 11, "symbol": "circle"},
    }
    groups: dict[tuple[Standing, str], list[Contender]] = {}
    for c, s in ranked:
        groups.setdefault((s, c.lines[0].method), []).append(c)
    for standing, look in looks.items():
        for (_, method), shown in ((of, group) for of, group in groups.items() if of[0] is standing):
            data.append(
                scatter(
                    [(c.size or 0) / divisor for c in shown],
                    [c.value for c in shown],
                    method,
                    mode="markers",
                    marker=look(method),
                    hovertext=[f"{_hover_contender(c)}<br>{standing.value}" for c in shown],
                    showlegend=standing is Standing.FRONT,
                )
            )
    layout = plot_layout(f"model size ({unit})", metric_axis(task.primary))
    choose_scale(layout, [c.value for c, _ in ranked])
    return Figure(f"pareto-{number}", f"{task.name}: quality and size", caption, {"data": data, "layout": layout})


def layer_errors(table: ModelTable, column: str, colours: dict[str, str], number: int) -> Figure | None:
    """`weight_error` or `output_error` of every quantized linear, in model order, one line per variant."""
    read = [(x, _layers(x.variant.quantize)) for x in table.quantized]
    drawn = [(x, [r for r in rows if r[column] is not None and math.isfinite(r[column])]) for x, rows in read]
    drawn = [(x, rows) for x, rows in drawn if rows]
    if not drawn:
        return None
    first = _most_compared([x for x, _ in drawn])
    schemes = list(dict.fromkeys(x.scheme for x, _ in drawn))
    modules: dict[str, Any] = {r["module"]: r["block"] for _, rows in drawn for r in rows}
    place = {m: i for i, m in enumerate(modules)}
    data = []
    for line, rows in drawn:
        data.append(
            scatter(
                [place[r["module"]] for r in rows],
                [short(r[column]) for r in rows],
                line.name,
                mode="lines+markers",
                line={"color": colours[line.method], "width": 1.5, "dash": DASHES[schemes.index(line.scheme) % len(DASHES)]},
                marker={"size": 4, "color": colours[line.method]},
                hovertext=[f"{safe(line.name)}<br>{safe(r['module'])}: {numbers.number(r[column])}" for r in rows],
                visible=True if line.scheme == first else "legendonly",
            )
        )
    layout = plot_layout("decoder block", LAYER_AXES[column])
    starts = [(i, b) for i, (m, b) in enumerate(modules.items()) if i == 0 or b != list(modules.values())[i - 1]]
    step = max(1, len(starts) // 16)
    layout["xaxis"] |= {"tickvals": [i for i, _ in starts][::step], "ticktext": [str(b) for _, b in starts][::step], "zeroline": False}
    shown = [r[column] for x, rows in drawn if x.scheme == first for r in rows]
    if min(r[column] for _, rows in drawn for r in rows) > 0:
        layout["yaxis"] |= log_axis(shown)
    caption = (
        f"Each point is one linear layer, in model order; a tick marks where a block begins. Variants of {first} are shown; "
        "tap a name in the legend to show or hide one, twice to see it alone."
    )
    if column == "output_error":
        caption += " Known where the method had collected a Hessian."
    return Figure(f"{column}-{number}", f"{column.replace('_', ' ').capitalize()} per layer", caption, {"data": data, "layout": layout})


def _layers(stage: StageResult | None) -> list[dict[str, Any]]:
    if stage is None or stage.payload is None:
        return []
    import pyarrow.parquet as pq

    try:
        path = payload_path(Path(stage.payload).parent, "layers.parquet")
    except CorruptArtifactError:
        return []  # the next run of the sweep finds it and makes the stage again; the figure shows the others
    rows: list[dict[str, Any]] = (
        pq.ParquetFile(path).read(columns=["module", "block", "weight_error", "output_error"], use_threads=False).to_pylist()
    )
    return rows


def _most_compared(lines: Sequence[Line]) -> str:
    """The scheme most methods share, the narrowest among equals: where comparing methods says most."""
    methods: dict[str, set[str]] = {}
    for line in lines:
        methods.setdefault(line.scheme, set()).add(line.method)
    width = {x.scheme: x.bits_nominal or math.inf for x in lines}
    return min(methods, key=lambda s: (-len(methods[s]), width[s]))


def _traces(name: str, points: Sequence[Point], task: TaskInfo, style: dict[str, Any]) -> list[dict[str, Any]]:
    """Points with their intervals, and the line: through the means where there are replicates."""
    means, points = _scheme_means(points), sorted(points, key=lambda p: p[1])
    replicated = len(means) < len(points)
    through = {"mode": "lines", "hoverinfo": "skip", "showlegend": False}
    out = [scatter([x for x, _ in means], [y for _, y in means], name, **style, **through)] if replicated else []
    bars = [_bar(line.cells[task.name]) for line, _, _ in points]
    error = {"type": "data", "array": [b[1] for b in bars], "arrayminus": [b[0] for b in bars], "thickness": 1, "width": 3}
    shown = [_hover(line, line.cells[task.name]) for line, _, _ in points]
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    return [*out, scatter(xs, ys, name, **style, mode="markers" if replicated else "lines+markers", error_y=error, hovertext=shown)]


def _scheme_means(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(bits, score) averaged over replicates of a scheme, ordered by bits."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for line, x, y in points:
        groups.setdefault(line.scheme, []).append((x, y))
    return sorted((sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups.values())


def _bar(row: Row) -> tuple[float, float]:
    """Reach of the interval below and above the score."""
    if row.delta is None or row.low is None or row.high is None:
        return 0.0, 0.0
    return max(0.0, row.delta - row.low), max(0.0, row.high - row.delta)


def _hover(line: Line, row: Row, name: str | None = None) -> str:
    parts = [f"<b>{safe(name or line.name)}</b>", f"{safe(row.metric)} {numbers.number(row.value, 4)}"]
    if row.delta is not None and row.low is not None and row.high is not None:
        parts.append(_difference(row.delta, row.low, row.high))
    return "<br>".join((*parts, _weights(line.bits_stored, line.model_bytes)))


def _hover_contender(c: Contender) -> str:
    if len(c.lines) == 1:
        return _hover(c.lines[0], c.rows[0], c.name)
    parts = [f"<b>{safe(c.name)}</b>", f"{safe(c.task.primary)} {numbers.number(c.value, 4)}", c.replicates]
    if c.difference is not None:
        parts.append(_difference(*c.difference))
    return "<br>".join((*parts, _weights(c.bits_stored, c.size)))


def _difference(delta: float, low: float, high: float) -> str:
    places = numbers.decimals_for(delta, low, high)
    return f"difference {numbers.signed(delta, places)} {numbers.interval(low, high, places)}".strip()


def _weights(bits: float | None, size: float | None) -> str:
    return f"{numbers.bits(bits)} stored bits, {numbers.size(size)}"


def _baseline_line(layout: dict[str, Any], value: float) -> None:
    line = {"color": GREY, "width": 1.5, "dash": "dash"}
    layout["shapes"].append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line})


def _is_baseline(c: Contender) -> bool:
    return c.lines[0].variant.is_baseline


def _colour(colours: dict[str, str], method: str) -> str:
    return colours.get(method, "#444b57")


def _left_out(caption: str, scoreless: int, unquantized: int) -> str:
    reasons = {"without a finite score (failed, not run, or overflowed)": scoreless, "without quantized weights": unquantized}
    said = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
    return f"{caption} Not drawn: {said}." if said else caption
