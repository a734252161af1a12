"""A sweep in the store: written when it starts, read back as a `SweepResult`.

`sweeps/<key>/plan.json` holds the plan, its settings and where it was first started from; statuses are not in it, they follow
from the records and failed attempts of its stages. `started.json` holds the latest command, for `bitgrid resume`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.command import Command
from orchestrator.errors import StoreError, unknown_name
from orchestrator.grid_axes import NAMING
from orchestrator.planned import Plan
from orchestrator.provenance import collect
from orchestrator.results import SkippedCell, StageResult, SweepResult, TaskInfo, VariantResult
from orchestrator.stage import Status
from orchestrator.store import Store, read_json, write_json
from workers.artifact import PAYLOAD, CorruptArtifactError, sealed
from workers.specs import StageKind

STARTED = "started.json"
PLANNED = ("name", "created", "config", "provenance", "models", "tasks", "variants", "stages", "skipped")
"""Keys of a plan that are read back."""
SHOWN = 8
"""Characters of a key that messages give."""
NAME_MARK = " · "
"""In a name, before the overrides that are common to all cells."""
LONGEST = 160
"""Characters of these."""


def write_sweep(store: Store, plan: Plan, command: Command) -> None:
    """Record a sweep before it runs. A sweep that is already there keeps its first start."""
    folder = store.sweep_folder(plan.key)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, sealed({"started": time.time(), "command": command.to_json()}))
    path = folder / "plan.json"
    settings = json.loads(json.dumps(plan.grid.settings, default=str))
    named = NAME_MARK.join((_named_by(plan), *([_common(plan.grid.common)] if plan.grid.common else [])))
    content = {**plan.to_json(), "name": named, "config": {"settings": settings, "axes": _axes(plan)}}
    old: dict[str, Any] = {}
    if path.is_file():
        try:
            old = _plan(store, plan.key)
        except StoreError:
            old = {}  # damaged: all but its first start is known
        if old and _head(old["name"]) == _named_by(plan):
            content["name"] = old["name"]  # the same grid, asked for in other words
        if old and all(old.get(k) == content[k] for k in content):
            return
    if old:
        content.update(created=old["created"], provenance=old["provenance"])
    else:
        content.update(created=time.time(), provenance=collect(command.overrides))
    write_json(path, sealed(content))


def last_command(store: Store, key: str) -> Command:
    """How the sweep was started last. Raises StoreError."""
    path = store.sweep_folder(key) / STARTED
    if not path.is_file():
        raise StoreError(f"{path} is not there, so the command of sweep {key[:8]} is not known; start it again with `bitgrid run`")
    remedy = "start the sweep again with `bitgrid run`"
    try:
        return Command.from_json(read_json(path, remedy, ("command",))["command"])
    except (KeyError, TypeError) as e:
        raise StoreError(f"{path} holds no command line ({type(e).__name__}: {e}); {remedy}") from e


def _named_by(plan: Plan) -> str:
    named = (plan.grid.settings.get("sweep") or {}).get("name")
    if named:
        return str(named)
    return " × ".join(_short(names) for axis, names in _axes(plan).items() if axis in NAMING)


def _common(overrides: Sequence[str]) -> str:
    told = ", ".join(overrides)
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}…"


def _head(name: str) -> str:
    return name.partition(NAME_MARK)[0]


def _short(names: Sequence[str]) -> str:
    return ",".join(names) if len(names) <= 3 else f"{len(names)} {names[0]}…"


def _axes(plan: Plan) -> dict[str, list[str]]:
    axes: dict[str, dict[str, None]] = {}
    for cell in plan.grid.cells:
        for option in cell:
            axes.setdefault(option.axis, {})[option.name] = None
    return {axis: list(names) for axis, names in axes.items()}


def find_sweep(store: Store, name: str | None) -> str:
    """Key of a sweep given by key prefix or name, with or without its common overrides; the latest when None. Raises StoreError naming
    those there are."""
    keys = store.sweep_keys()
    if not keys:
        raise StoreError(f"the store {store.root} holds no sweep yet; start one with `bitgrid run`")
    if name is None:
        return keys[0]
    found = [k for k in keys if k.startswith(name)]
    if len(found) != 1 or len(name) < SHOWN:  # `c4` may be a sweep's name, and the start of another one's key
        names = {k: _named(store, k) for k in keys}
        found = [k for k, n in names.items() if n == name] or [k for k, n in names.items() if n and _head(n) == name] or found
        if len(found) > 1:
            told = "".join(f"\n  {k[:8]} {names[k]}" for k in found)
            raise StoreError(f"sweep {name!r} is not the only one, the latest first:{told}\ngive its key")
        if not found:
            raise StoreError(unknown_name("sweep", name, [n for k in keys for n in (k[:8], names[k]) if n]))
    return found[0]


def _named(store: Store, key: str) -> str:
    """Empty where the plan is damaged: other sweeps are found all the same."""
    try:
        return str(_plan(store, key)["name"])
    except StoreError:
        return ""


def _plan(store: Store, key: str) -> dict[str, Any]:
    return read_json(store.sweep_folder(key) / "plan.json", "start the sweep again with `bitgrid run`, which writes it anew", PLANNED)


def load_sweep(store: Store, key: str, running: Collection[str] = ()) -> SweepResult:
    """What the store knows of a sweep now. `running`: keys of stages that a live driver has under way, which no record tells."""
    plan = _plan(store, key)
    stages = _stages(store, plan["stages"], running)
    tasks = {n: TaskInfo(n, t["kind"], t["primary"], t["higher_is_better"]) for n, t in plan["tasks"].items()}
    variants = tuple(
        VariantResult(
            key=k,
            label=v["label"],
            axes=v["axes"],
            is_baseline=k == v["baseline"],
            baseline_key=v["baseline"],
            quantize=stages[v["quantize"]] if v["quantize"] else None,
            evaluations={task: stages[s] for task, s in v["evaluations"].items()},
            measure=stages[v["measure"]] if v.get("measure") else None,
            flags=tuple(v["flags"]),
        )
        for k, v in plan["variants"].items()
    )
    return SweepResult(
        key=key,
        name=plan["name"],
        created=plan["created"],
        config=plan["config"],
        provenance=plan["provenance"],
        tasks=tasks,
        variants=variants,
        stages=stages,
        skipped=tuple(SkippedCell(s["axes"], s["reason"]) for s in plan["skipped"]),
        model_names={digest: m["name"] for digest, m in plan["models"].items()},
        model_bytes={digest: m["bytes"] for digest, m in plan["models"].items() if m.get("bytes")},
    )


def _stages(store: Store, planned: Mapping[str, Mapping[str, Any]], running: Collection[str]) -> dict[str, StageResult]:
    # Inputs come before the stages that read them: plans are written in that order.
    stages: dict[str, StageResult] = {}
    for key, stage in planned.items():
        stages[key] = _stage(store, key, stage, stages, running)
    return stages


def _stage(store: Store, key: str, stage: Mapping[str, Any], done: Mapping[str, StageResult], running: Collection[str]) -> StageResult:
    kind = StageKind(stage["kind"])
    result = StageResult(key, kind.value, stage["label"], Status.PENDING, spec=stage["spec"])
    if store.has(kind, key):
        try:
            record = store.record(kind, key)
        except CorruptArtifactError:
            return result
        return replace(
            result, status=Status.SUCCEEDED, record=record, payload=store.folder(kind, key) / PAYLOAD, computed_by=record["sweep"]
        )
    if key in running:
        return replace(result, status=Status.RUNNING)
    for needed in (done[i] for i in stage["inputs"].values()):
        if needed.status in (Status.FAILED, Status.DEP_FAILED):
            return replace(result, status=Status.DEP_FAILED, blocked_by=needed.blocked_by or needed.key)
    attempts = store.attempts(key)
    if attempts and attempts[-1]["final"]:
        return replace(result, status=Status.FAILED, failure=attempts[-1])
    return result
