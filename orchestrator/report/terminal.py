"""The table of a sweep in the terminal, or in a log file."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.lines import FEWEST_COLUMNS, show_table
from orchestrator.report import numbers
from orchestrator.report.overview import Line, ModelTable, counts, failures, model_tables, resampled, skips, state_word
from orchestrator.report.speed import speed_table
from orchestrator.report.tables import Row, long_table
from orchestrator.results import SweepResult, TaskInfo

_FRAME = 2
"""Columns between two table columns: padding and divider."""


def print_table(result: SweepResult, console: Console) -> None:
    """Variants × tasks with the difference to the unquantized model, stored bits and size; then what failed or was skipped.

    Fits `console.width` from 64 columns on, and has as many on a narrower terminal: cells take two lines where one does not fit, tasks
    continue in a further table where two lines do not fit either, and names too long for what is left are wrapped.
    """
    rows = long_table(result)
    tables = model_tables(result, rows)
    for table in tables:
        for part in _parts(table, max(console.width, FEWEST_COLUMNS)):
            show_table(console, part)
        speed = speed_table(table)
        if speed is not None:
            show_table(console, speed)
    _print_legend(result, rows, tables, console)
    _print_troubles(result, rows, console)


def cell_lines(row: Row | None, is_baseline: bool) -> tuple[str, str]:
    """Score, and difference with interval: `87.2`, `+2.0 [1.8, 2.3]*`."""
    if row is None:
        return "–", ""
    if row.value is None:
        return state_word(row), ""
    if is_baseline or row.delta is None:
        return numbers.number(row.value), ""
    low, high = (float("nan") if x is None else x for x in (row.low, row.high))
    return numbers.number(row.value), difference_text(row.delta, low, high, baseline=row.baseline_value) + ("*" if row.separable else "")


def difference_text(delta: float, low: float, high: float, *, baseline: float | None) -> str:
    """`+2.0 [1.8, 2.3]`; the interval alone against a baseline of exactly zero (divergence), where the difference is the score itself."""
    places = numbers.decimals_for(delta, low, high)
    difference = "" if baseline == 0 else numbers.signed(delta, places)
    return f"{difference} {numbers.interval(low, high, places)}".strip()


def _parts(table: ModelTable, width: int) -> list[Table]:
    names = max(len(x.name) for x in table.lines)
    sizes = 2 * _FRAME + len("stored") + max(len(numbers.size(x.model_bytes)) for x in table.lines)
    if table.has_caches:
        sizes += _FRAME + max(len("KV bits"), *(len(numbers.bits_span(x.kv_bits_stored)) for x in table.lines))
    for separator in ("  ", "\n"):
        widths = {t.name: max(_width(x, t, separator) for x in table.lines) + _FRAME for t in table.tasks}
        if names + sizes + sum(widths.values()) <= width:
            return [_table(table, table.tasks, separator, 0)]
    groups: list[list[TaskInfo]] = [[]]
    left = max(width - names - sizes, max(widths.values()))
    for task in table.tasks:
        if groups[-1] and sum(widths[t.name] for t in (*groups[-1], task)) > left:
            groups.append([])
        groups[-1].append(task)
    return [_table(table, tuple(g), "\n", i) for i, g in enumerate(groups)]


def _width(line: Line, task: TaskInfo, separator: str) -> int:
    text = separator.join(cell_lines(line.cells.get(task.name), line.variant.is_baseline)).rstrip()
    return max(len(part) for part in (*text.split("\n"), *_heading(task).split("\n")))


def _heading(task: TaskInfo) -> str:
    return f"{task.name}\n{task.primary} {'↑' if task.higher_is_better.get(task.primary) else '↓'}"


def _table(table: ModelTable, tasks: tuple[TaskInfo, ...], separator: str, part: int) -> Table:
    title = escape(table.model) + (" (continued)" if part else "")
    out = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.HORIZONTALS if separator == "\n" else box.SIMPLE_HEAD,
        show_lines=separator == "\n",
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    # The only column that may wrap: rich takes what is missing from it first.
    out.add_column("variant", overflow="fold")
    for task in tasks:
        out.add_column(escape(_heading(task)), justify="right", no_wrap=True, overflow="fold")
    out.add_column("stored\nbits", justify="right", no_wrap=True, overflow="fold")
    out.add_column("size", justify="right", no_wrap=True, overflow="fold")
    if table.has_caches:
        out.add_column("stored\nKV bits", justify="right", no_wrap=True, overflow="fold")
    for line in table.lines:
        cells = [_cell(line.cells.get(t.name), line.variant.is_baseline, separator) for t in tasks]
        style = "bold" if line.variant.is_baseline else None
        cache = [numbers.bits_span(line.kv_bits_stored)] if table.has_caches else []
        out.add_row(Text(line.name), *cells, numbers.bits(line.bits_stored), numbers.size(line.model_bytes), *cache, style=style)
    return out


def _cell(row: Row | None, is_baseline: bool, separator: str) -> Text:
    score, difference = cell_lines(row, is_baseline)
    if row is not None and row.value is None:
        return Text(score, style="bold red" if score == "FAILED" else "dim")
    text = Text(score)
    if difference:
        text.append(separator + difference, style="" if difference.endswith("*") else "dim")
    return text


def _print_legend(result: SweepResult, rows: tuple[Row, ...], tables: tuple[ModelTable, ...], console: Console) -> None:
    if any(r.delta is not None for r in rows):
        units = {t.model: said for t in tables if (said := resampled(t))}
        if len(set(units.values())) > 1:  # another tokenizer cuts a text into other windows
            units = {model: f"{model}, {said}" for model, said in units.items()}
        console.print(
            "Score, then difference to the unquantized model with its 95 % interval over pairs"
            + (f" (resampled: {'; '.join(dict.fromkeys(units.values()))})" if units else "")
            + ". * differs after Holm's correction over the whole table.",
            style="dim",
            highlight=False,
            markup=False,  # names of swept tasks and models have brackets
        )
    if not result.variants:
        console.print("No variant was planned.", highlight=False)


def _print_troubles(result: SweepResult, rows: tuple[Row, ...], console: Console) -> None:
    c = counts(rows)
    said = ", ".join(f"{n} {word}" for n, word in ((c.done, "done"), (c.failed, "failed"), (c.waiting, "not run")) if n)
    skipped = f"; {numbers.count(c.skipped, 'cell')} skipped" if c.skipped else ""
    console.print(f"{numbers.count(c.scores, 'score')}{': ' if said else ''}{said}{skipped}.", highlight=False)
    for message, stages in failures(result):
        labels = ", ".join(s.label for s in stages[:3]) + (f" and {len(stages) - 3} more" if len(stages) > 3 else "")
        console.print(f"[bold red]FAILED[/] {escape(labels)}\n  {escape(message)}", highlight=False)
    for reason, axes in skips(result):
        console.print(f"skipped {len(axes)}: {escape(reason)}", highlight=False)
