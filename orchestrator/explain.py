"""Why a stage would run: its spec beside the nearest one in the store, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.fingerprint import identity
from orchestrator.planned import Plan
from orchestrator.stage import Stage
from orchestrator.store import Store
from workers.specs import StageKind


@dataclass(frozen=True)
class Difference:
    field: str
    """Dotted path: `spec.rules.0.weight.bits`."""
    stored: Any
    wanted: Any


@dataclass(frozen=True)
class Explanation:
    stage: Stage
    reason: str
    """cached; failed before; first of its kind; or differs from the nearest stored stage."""
    nearest: str | None = None
    differences: tuple[Difference, ...] = ()


_ABSENT = "(default)"


def explain(plan: Plan, store: Store) -> Iterator[Explanation]:
    """One explanation per stage, in plan order."""
    stored: dict[StageKind, list[tuple[str, dict[str, Any]]]] = {}
    for stage in plan.stages.values():
        if store.has(stage.kind, stage.key):
            whole = not plan.is_result(stage.key) or store.is_whole(stage.kind, stage.key)
            yield Explanation(stage, "cached" if whole else "its artifact is corrupt")
            continue
        if stage.kind not in stored:
            stored[stage.kind] = [(f.name, json.loads((f / "spec.json").read_text())) for f in store.records(stage.kind)]
        attempts = store.attempts(stage.key)
        if attempts:
            yield Explanation(stage, f"failed before ({len(attempts)} attempts, last: {attempts[-1]['type']}: {attempts[-1]['message']})")
            continue
        wanted = _flat(identity(stage.kind, stage.spec, stage.inputs))
        candidates = [(key, _differences(_flat(spec), wanted)) for key, spec in stored[stage.kind]]
        if not candidates:
            yield Explanation(stage, f"no {stage.kind.value} stage is in the store")
            continue
        nearest, differences = min(candidates, key=lambda c: (len(c[1]), c[0]))
        yield Explanation(stage, "differs from the nearest stored stage", nearest, differences)


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> tuple[Difference, ...]:
    names = sorted(stored.keys() | wanted.keys())
    pairs = ((n, stored.get(n, _ABSENT), wanted.get(n, _ABSENT)) for n in names)
    return tuple(Difference(n, a, b) for n, a, b in pairs if a != b)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for name, inner in items for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()}
