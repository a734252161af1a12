"""The sections of the report page, from the headline to the provenance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from orchestrator.report import numbers
from orchestrator.report.choices import Contender, best_per_width
from orchestrator.report.cost import costs, stage_bytes
from orchestrator.report.figures import metric_axis, metric_name
from orchestrator.report.heat import heat_map
from orchestrator.report.markup import Markup, Td, details, join, table, tag
from orchestrator.report.overview import FAILED_STATES, Line, ModelTable, counts, failures, remarks, resampled, skips, state_word
from orchestrator.report.plot import Figure
from orchestrator.report.tables import Row
from orchestrator.report.terminal import cell_lines, difference_text
from orchestrator.results import SweepResult, TaskInfo


def headline(result: SweepResult, rows: Sequence[Row], models: Sequence[ModelTable]) -> Markup:
    c = counts(rows)
    done = "score finished" if c.done == 1 else "scores finished"
    skipped = "cell skipped" if c.skipped == 1 else "cells skipped"
    tally = [(done, c.done, ""), ("failed", c.failed, "bad"), ("not run", c.waiting, ""), (skipped, c.skipped, "")]
    items = [tag("li", tag("b", n, class_=mark if n else None), tag("span", word)) for word, n, mark in tally if n or word == done]
    items.append(tag("li", tag("b", sum(len(m.quantized) for m in models)), tag("span", "quantized variants")))
    items.append(tag("li", tag("b", len(models)), tag("span", "model" if len(models) == 1 else "models")))
    ended = [float(s.record["ended"]) for s in result.stages.values() if s.record is not None and not result.reused(s)]
    when = f"Started {numbers.moment(result.created)}" + (f", last stage ended {numbers.moment(max(ended))}" if ended else "")
    return join(
        (
            tag("h1", result.name),
            tag("p", f"{when} · sweep ", tag("code", result.key[:12]), class_="soft"),
            tag("ul", *items, class_="tally"),
        )
    )


def model_section(model: ModelTable, number: int, figures: Sequence[Figure], layers: Sequence[Figure]) -> Markup:
    """number: of the model on the page. figures, layers: of its scores, and of errors layer by layer."""
    parts: list[object] = [tag("h2", model.model, id=f"model-{number}")]
    if not model.quantized:
        parts.append(tag("p", "No quantized variant of this model is in the sweep."))
    parts += [_picks(model), tag("h3", "Every variant"), _score_caption(model), score_table(model), _other_metrics(model)]
    if figures:
        parts.append(tag("div", *map(figure, figures), class_="grid"))
    elif model.quantized:
        parts.append(tag("p", "No figure yet: no quantized variant has a finite score and a known size.", class_="caption"))
    if model.quantized:
        parts.append(tag("h3", "Method by scheme"))
        parts.append(
            tag(
                "p",
                "Difference to the unquantized model; the darker, the worse. Schemes run from the widest weights to the narrowest.",
                class_="caption",
            )
        )
        for task in model.tasks:
            parts += [tag("p", f"{task.name}, {metric_axis(task.primary)}", class_="task"), heat_map(model, task)]
    if layers:
        parts += [tag("h3", "Where the error is"), tag("div", *map(figure, layers), class_="grid")]
    return join(parts, "\n")


def figure(f: Figure) -> Markup:
    data = json.dumps(f.spec, sort_keys=True, allow_nan=False).replace("<", "\\u003c")  # no text can end the script element
    plot = tag("div", id=f.id, class_="plot", role="img", aria_label=f.title)
    script = Markup(f'<script type="application/json" class="figure" data-plot="{f.id}">{data}</script>')
    return tag("figure", tag("h3", f.title), plot, tag("figcaption", f.caption), script)


def score_table(model: ModelTable) -> Markup:
    """Headline score per task, difference below it; the exact numbers are in data attributes."""
    heads = [_heading(t) for t in model.tasks]
    headings: list[object] = ["variant", *heads, "stored bits", "size"]
    rows = [[Td(x.name), *(_score(x.cells.get(t.name), x) for t in model.tasks), *_sizes(x)] for x in model.lines]
    if model.has_caches:
        headings.append("stored KV bits")
        rows = [[*r, _cache(x)] for r, x in zip(rows, model.lines, strict=True)]
    if any(x.variant.all_flags for x in model.lines):
        headings.append("flags")
        rows = [[*r, Td("; ".join(x.variant.all_flags), class_="wrap")] for r, x in zip(rows, model.lines, strict=True)]
    classes = ["baseline" if x.variant.is_baseline else "" for x in model.lines]
    return table(headings, rows, label=f"{model.model}: scores", class_="scores", row_classes=classes)


def _score_caption(model: ModelTable) -> Markup:
    units = resampled(model)
    return tag(
        "p",
        "Score, and below it the difference to the unquantized model with its 95 % interval. ",
        f"Resampled in pairs: {units}. " if units else "",
        tag("b", "*"),
        " marks differences that stand after Holm's correction over all variants and tasks. Click a heading to sort.",
        class_="caption",
    )


def _heading(task: TaskInfo) -> Markup:
    better = "higher is better" if task.higher_is_better.get(task.primary) else "lower is better"
    return join((task.name, tag("small", f"{metric_name(task.primary)}, {better}")))


def _score(row: Row | None, line: Line) -> Td:
    if row is None:
        return Td("–", sort="", class_="state", title="not in the grid, or skipped")
    if row.value is None:
        return Td(state_word(row), sort="", class_="bad" if row.status in FAILED_STATES else "state", title=row.reason)
    score, difference = cell_lines(row, line.variant.is_baseline)
    data = [(k, repr(v)) for k in ("value", "delta", "low", "high", "p_holm") if (v := getattr(row, k)) is not None]
    below = tag("span", difference, class_="delta stands" if row.separable else "delta") if difference else ""
    return Td(join((score, below)), sort=repr(row.value), title=row.reason or None, data=tuple((k, v) for k, v in data))


def _sizes(line: Line) -> tuple[Td, Td]:
    stored, total = line.bits_stored, line.model_bytes
    return (
        Td(numbers.bits(stored), sort="" if stored is None else repr(stored)),
        Td(numbers.size(total), sort="" if total is None else total),
    )


def _cache(line: Line) -> Td:
    return Td(numbers.bits_span(line.kv_bits_stored), sort=repr(line.kv_bits_stored[0]) if line.kv_bits_stored else "")


def _other_metrics(model: ModelTable) -> Markup:
    named = list(dict.fromkeys((t.name, r.metric) for t in model.tasks for x in model.lines for r in x.others.get(t.name, ())))
    if not named:
        return Markup("")
    rows = []
    for line in model.lines:
        found = {(r.task, r.metric): r for rows_ in line.others.values() for r in rows_}
        rows.append([Td(line.name), *(_score(found.get(n), line) for n in named)])
    heads = [join((metric_name(metric), tag("small", task))) for task, metric in named]
    return details("All other metrics", table(["variant", *heads], rows, label=f"{model.model}: other metrics"))


def _picks(model: ModelTable) -> Markup:
    best = best_per_width(model)
    if not best:
        return Markup("")
    rows = []
    for width, picks in best.items():
        cells = []
        for task in model.tasks:
            pick = picks.get(task.name)
            if pick is None:
                cells.append(Td("–", sort=""))
                continue
            tied = f"not separable: {', '.join(pick.tied)}" if pick.tied else ""
            below = [tag("span", t, class_="delta") for t in (*_pick_lines(pick.best), tied) if t]
            cells.append(Td(join((tag("b", pick.best.name), *below)), sort=repr(pick.best.value), class_="wrap"))
        rows.append([Td(f"{width:.3g}", sort=repr(width)), *cells])
    heads = [join((t.name, tag("small", metric_name(t.primary)))) for t in model.tasks]
    parts = [tag("h3", "Best of each weight width")]
    if any(x.contender != x.name for x in model.quantized):
        said = "Judged by the mean of replicates; intervals hold how far other text and other draws of calibration would move it."
        parts.append(tag("p", said, class_="caption"))
    return join((*parts, table(["bits", *heads], rows, label=f"{model.model}: best of each weight width")))


def _pick_lines(best: Contender) -> tuple[str, str]:
    """Score and difference as in the table, those of a mean without its mark; and what it is the mean of."""
    if len(best.lines) == 1:
        return "  ".join(filter(None, cell_lines(best.rows[0], False))), best.replicates
    mean = best.difference
    said = "" if mean is None else difference_text(*mean, baseline=best.rows[0].baseline_value)
    return f"{numbers.number(best.value)}  {said}".strip(), best.replicates


def troubles(result: SweepResult) -> Markup:
    failed, skipped, said = failures(result), skips(result), remarks(result)
    parts: list[object] = [tag("h2", "Failures, skips and remarks", id="troubles")]
    if not (failed or skipped or said):
        parts.append(tag("p", "None: every cell of the grid ran, and no stage had to depart from what was asked."))
    behind = Counter(s.blocked_by for s in result.stages.values())
    for message, stages in failed:
        blocked = sum(behind[s.key] for s in stages)
        after = f"; {blocked} stages behind {'them' if len(stages) > 1 else 'it'} did not run" if blocked else ""
        inner = [join((tag("h3", s.label), tag("pre", str((s.failure or {}).get("log_tail") or "no log was kept")))) for s in stages]
        parts.append(
            details(join((tag("span", "FAILED ", class_="bad"), message, f" ({numbers.count(len(stages), 'stage')}{after})")), *inner)
        )
    for reason, cells in skipped:
        lines = "\n".join(" · ".join(axes.values()) for axes in cells)
        parts.append(details(f"Skipped: {reason} ({numbers.count(len(cells), 'cell')})", tag("pre", lines)))
    for remark, whom in said:
        parts.append(details(f"{remark} ({len(whom)}×)", tag("pre", "\n".join(whom))))
    return join(parts, "\n")


def cost_section(result: SweepResult) -> Markup:
    c = costs(result)
    rows: list[list[Td | object]] = []
    for k in c.kinds:
        seconds = (Td(numbers.duration(s), sort=repr(s)) for s in (k.run_seconds, k.reused_seconds))
        rows.append([k.kind, k.run, k.reused, k.failed, k.waiting, *seconds, Td(numbers.size(k.bytes), sort=k.bytes)])
    heads = ["stage", "run", "reused", "failed", "not run", "time run", "time reused", "stored"]
    parts: list[object] = [tag("h2", "Cost", id="cost")]
    reuse = sum(k.reused_seconds for k in c.kinds)
    earlier = f"; reused ones took {numbers.duration(reuse)} in earlier sweeps" if reuse else ""
    said = f"Stages of this sweep took {numbers.duration(c.run_seconds)} of worker time{earlier}."
    if c.scores:
        said += (
            f" Those that scores need took {numbers.duration(c.shared_seconds)}, each once; one job per score, each computing all it "
            f"needs, would have taken {numbers.duration(c.alone_seconds)}: sharing stages saved {numbers.duration(c.saved_seconds)}."
        )
    parts += [tag("p", said), table(heads, rows, label="Cost per kind of stage")]
    stages = []
    for s in sorted(result.stages.values(), key=lambda s: (-(s.seconds or 0.0), s.label)):
        source = "reused" if result.reused(s) else "run" if s.record else s.status.value
        phases = ", ".join(f"{k} {numbers.duration(v)}" for k, v in (s.record or {}).get("seconds", {}).items())
        stages.append(
            [
                s.label,
                source,
                Td(numbers.duration(s.seconds), sort="" if s.seconds is None else repr(s.seconds)),
                Td(numbers.size(stage_bytes(s)), sort=stage_bytes(s)),
                Td(phases, class_="left"),
                Td(tag("code", s.key[:12]), class_="left"),
            ]
        )
    every = table(["stage", "source", "time", "stored", "of which", "key"], stages, label="Cost of every stage")
    return join((*parts, details(f"Every stage ({len(stages)})", every)), "\n")


def provenance(result: SweepResult) -> Markup:
    environments: dict[str, int] = {}
    kernels: dict[str, int] = {}
    for s in result.stages.values():
        if s.record is not None:
            said = _pretty(s.record.get("environment", {}))
            environments[said] = environments.get(said, 0) + 1
            for operation, backends in s.record.get("kernels", {}).items():
                for name in backends:
                    kernels[f"{operation}: {name}"] = kernels.get(f"{operation}: {name}", 0) + 1
    texts = sorted({d for s in result.stages.values() if s.record is not None for d in _text_digests(s.spec)})
    # Short facts stand in the open: `git` as git commit, git dirty.
    small = {k: v for k, v in result.provenance.items() if isinstance(v, dict) and len(v) <= 3}
    facts = [(k, v) for k, v in result.provenance.items() if not isinstance(v, (dict, list, tuple))]
    facts += [(f"{k} {name}", v) for k, values in small.items() for name, v in values.items()]
    if kernels:
        facts.append(("kernels", ", ".join(f"{k} ({numbers.count(n, 'stage')})" for k, n in sorted(kernels.items()))))
    nested = {k: v for k, v in result.provenance.items() if isinstance(v, (dict, list, tuple)) and k not in small}
    keys = table(
        ["variant", "variant key", "quantize", *(f"evaluate {t}" for t in result.tasks)],
        [
            [
                v.label,
                *(
                    Td(tag("code", k[:16]) if k else "–", class_="left")
                    for k in (v.key, v.quantize.key if v.quantize else "", *(_key(v.evaluations.get(t)) for t in result.tasks))
                ),
            ]
            for v in result.variants
        ],
        label="Keys",
    )
    facts_list = tag("dl", *(join((tag("dt", k), tag("dd", v))) for k, v in [("sweep key", result.key), *facts]))
    return join(
        (
            tag("h2", "Provenance", id="provenance"),
            facts_list,
            details("Packages, overrides and other facts", tag("pre", _pretty(nested))),
            details("Configuration", tag("pre", _pretty(result.config))),
            details("Models and texts by content digest", tag("pre", _pretty({"models": result.model_names, "texts": texts}))),
            details(
                "Environments of the stages", *(join((tag("p", numbers.count(n, "stage")), tag("pre", e))) for e, n in environments.items())
            ),
            details(f"Keys of {numbers.count(len(result.variants), 'variant')}", keys),
        ),
        "\n",
    )


def _key(stage: Any) -> str:
    return stage.key if stage is not None else ""


def _text_digests(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["text"]["digest"]] if isinstance(value.get("text"), dict) and "digest" in value["text"] else []
        return own + [d for v in value.values() for d in _text_digests(v)]
    return [d for v in value for d in _text_digests(v)] if isinstance(value, (list, tuple)) else []


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, default=str, ensure_ascii=False)
