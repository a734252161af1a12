"""`bitgrid plan` and `bitgrid explain`: look, touch nothing, import no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from orchestrator.explain import explain
from orchestrator.grid import compose_grid
from orchestrator.ledger import Ledger
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.report.numbers import duration, size
from orchestrator.run import estimator, missing_stages, sources, store_root
from orchestrator.store import Store


def print_plan(overrides: Sequence[str], multirun: bool, console: Console) -> None:
    plan, store = _plan(overrides, multirun)
    missing = missing_stages(plan, store)
    columns = ("stage", "in all", "cached", "to run", "estimated time", "estimated size")
    table = Table(*columns, title=f"sweep {plan.key[:8]}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, stages in _by_kind(plan).items():
        todo = [plan.stages[k] for k in stages if k in missing]
        there = sum(1 for k in stages if store.has(plan.stages[k].kind, k))
        seconds = sum(s.resources.seconds for s in todo)
        space = sum(s.resources.output_bytes for s in todo)
        table.add_row(kind, str(len(stages)), str(there), str(len(todo)), duration(seconds) if todo else "", size(space) if todo else "")
    console.print(table)
    total = sum(s.resources.seconds for s in missing.values())
    console.print(
        f"{len(plan.cells)} cells, {len(plan.variants)} variants; about {duration(total)} of work in all, shared by the workers"
        if missing
        else f"{len(plan.cells)} cells, {len(plan.variants)} variants; everything is cached",
        highlight=False,
    )
    _print_left_out(plan, console)


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
        console.print(f"{reason} ({len(cells)}: {cells[0]}{', …' if len(cells) > 1 else ''})", highlight=False, markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _by_kind(plan: Plan) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for stage in plan.stages.values():
        kinds[stage.kind.value].append(stage.key)
    return {k: kinds[k] for k in ("calibrate", "quantize", "evaluate") if k in kinds}


def print_explanations(overrides: Sequence[str], multirun: bool, console: Console) -> None:
    plan, store = _plan(overrides, multirun)
    cached: Counter[str] = Counter()
    for found in explain(plan, store):
        if found.reason == "cached":
            cached[found.stage.kind.value] += 1
            continue
        nearest = f" ({found.nearest[:8]})" if found.nearest else ""
        console.print(f"{found.stage.label} [{found.stage.key[:8]}]: {found.reason}{nearest}", highlight=False, markup=False)
        for difference in found.differences:
            line = f"    {difference.field}: stored {difference.stored!r}, wanted {difference.wanted!r}"
            console.print(line, highlight=False, markup=False)
    if cached:
        console.print("cached: " + ", ".join(f"{n} {kind}" for kind, n in cached.items()), highlight=False)


def _plan(overrides: Sequence[str], multirun: bool) -> tuple[Plan, Store]:
    grid = compose_grid(overrides, multirun=multirun)
    store = Store(store_root(grid.settings))
    if (store.root / "store.json").is_file():
        store.open(create=False)
    path = store.root / "ledger.sqlite"
    if not path.is_file():
        return build_plan(grid, sources(grid.settings, store.root, allow_provisional=True), estimator(None)), store
    with Ledger(path) as ledger:
        return build_plan(grid, sources(grid.settings, store.root, allow_provisional=True), estimator(ledger)), store
