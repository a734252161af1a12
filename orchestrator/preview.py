"""`bitgrid plan` and `bitgrid explain`: look, touch nothing, import no torch."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from orchestrator.command import Command
from orchestrator.explain import explain
from orchestrator.ledger import read_durations
from orchestrator.lines import say, show_table
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.report.numbers import count, duration, size
from orchestrator.run import check_settings, estimator, missing_stages, sources, store_root
from orchestrator.stage import Stage
from orchestrator.store import Store
from orchestrator.toolkits import require_toolkits
from workers.specs import StageKind


def print_plan(command: Command, console: Console) -> None:
    plan, store = _plan(command)
    missing = missing_stages(plan, store)
    require_toolkits(plan, missing)
    columns = ("stage", "in all", "cached", "to run", "estimated time", "estimated size")
    table = Table(*columns, title=f"sweep {plan.key[:8]}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, stages in _by_kind(plan).items():
        todo = [plan.stages[k] for k in stages if k in missing]
        there = sum(1 for k in stages if k not in missing and store.has(plan.stages[k].kind, k))
        table.add_row(kind, str(len(stages)), str(there), str(len(todo)), _seconds(todo), _bytes(todo))
    show_table(console, table)
    work = list(missing.values())
    total = f"in all {_seconds(work)} of work, shared by the workers, and {_bytes(work)}"
    if not work:
        total = "everything is cached"
    elif _unknown(work):
        total = "how much work it is depends on models whose size is not known"
    console.print(f"{count(len(plan.cells), 'cell')}, {count(len(plan.variants), 'variant')}; {total}", highlight=False)
    if any(1 < s.resources.uncertainty < math.inf for s in work):
        console.print("A range stands where no stage of that kind, model and method or task has run here yet.", highlight=False)
    _print_left_out(plan, console)


def _seconds(stages: Sequence[Stage]) -> str:
    return _range([s.resources.seconds for s in stages], stages, duration)


def _bytes(stages: Sequence[Stage]) -> str:
    return _range([float(s.resources.output_bytes) for s in stages], stages, size)


def _range(estimates: Sequence[float], stages: Sequence[Stage], text: Callable[[float], str]) -> str:
    """The sum, with its bounds where some of it is a guess; empty for none."""
    if not stages:
        return ""
    if _unknown(stages):
        return "unknown"
    low = text(sum(e / s.resources.uncertainty for e, s in zip(estimates, stages, strict=True)))
    high = text(sum(e * s.resources.uncertainty for e, s in zip(estimates, stages, strict=True)))
    return f"about {low}" if low == high else f"{low} to {high}"


def _unknown(stages: Sequence[Stage]) -> bool:
    return any(math.isinf(s.resources.uncertainty) for s in stages)


def _print_left_out(plan: Plan, console: Console) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for skip in plan.skipped:
        groups[f"skipped: {skip.reason}"].append(" ".join(skip.cell.names().values()))
    for cell, rule in plan.grid.excluded:
        groups[f"excluded: {rule}"].append(" ".join(cell.names().values()))
    for variant in plan.variants.values():
        for flag in variant.flags:
            groups[f"note: {flag}"].append(variant.label)
    for reason, cells in groups.items():
        say(console, f"{reason} ({len(cells)}: {cells[0]}{', …' if len(cells) > 1 else ''})")
    for note in plan.notes:
        say(console, f"note: {note}")


def _by_kind(plan: Plan) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for stage in plan.stages.values():
        kinds[stage.kind.value].append(stage.key)
    return {k: kinds[k] for k in (kind.value for kind in StageKind) if k in kinds}


def print_explanations(command: Command, console: Console) -> None:
    plan, store = _plan(command)
    missing = missing_stages(plan, store)
    cached: Counter[str] = Counter()
    for found in explain(plan, store):
        if found.stage.key not in missing and found.reason != "cached":
            continue  # its artifact is gone, and nobody needs it
        if found.reason == "cached":
            cached[found.stage.kind.value] += 1
            continue
        nearest = f" ({found.nearest[:8]})" if found.nearest else ""
        say(console, f"{found.stage.label} [{found.stage.key[:8]}]: {found.reason}{nearest}")
        for difference in found.differences:
            line = f"    {difference.field}: stored {difference.stored!r}, wanted {difference.wanted!r}"
            say(console, line)
    if cached:
        console.print("cached: " + ", ".join(f"{n} {kind}" for kind, n in cached.items()), highlight=False)


def _plan(command: Command) -> tuple[Plan, Store]:
    grid = command.compose()
    check_settings(grid.settings)
    store = Store(store_root(grid.settings))
    store.check()
    # A driver may be at work on the store: nothing of it is held or written here.
    history = read_durations(store.root / "ledger.sqlite")
    return build_plan(grid, sources(grid.settings, store.root, preview=True), estimator(history)), store
