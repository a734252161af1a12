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

CANDIDATES = 500
"""Stored stages that a wanted one is compared with in full, at most."""


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
_SUBJECT = ("digest", "kind", "name", "statistic")
"""Last part of the fields that say what a stage is about: model, texts, transforms and rounding, task, statistic."""
_Fields = frozenset[tuple[str, Any]]


def explain(plan: Plan, store: Store) -> Iterator[Explanation]:
    """One explanation per stage, in plan order."""
    stored: dict[StageKind, _Stored] = {}
    for stage in plan.stages.values():
        if store.has(stage.kind, stage.key):
            whole = not plan.is_result(stage.key) or store.is_whole(stage.kind, stage.key)
            yield Explanation(stage, "cached" if whole else "its artifact is corrupt")
            continue
        attempts = store.attempts(stage.key)
        if attempts:
            yield Explanation(stage, f"failed before ({len(attempts)} attempts, last: {attempts[-1]['type']}: {attempts[-1]['message']})")
            continue
        if stage.kind not in stored:
            stored[stage.kind] = _Stored(store, stage.kind)
        there = stored[stage.kind]
        wanted = _Spec.of(stage.key, identity(stage.kind, stage.spec, stage.inputs))
        nearest = there.nearest(wanted)
        readable = f" that can be read ({there.damaged} cannot)" if there.damaged else ""
        if nearest is None:
            yield Explanation(stage, f"no {stage.kind.value} stage is in the store{readable}")
            continue
        differences = _differences(nearest.values, wanted.values)
        yield Explanation(stage, f"differs from the nearest stored stage{readable}", nearest.key, differences)


@dataclass(frozen=True)
class _Spec:
    """What a key is made of, flattened."""

    key: str
    values: dict[str, Any]
    fields: _Fields
    subject: _Fields

    @classmethod
    def of(cls, key: str, content: Any) -> _Spec:
        """Raises ValueError for what is no mapping."""
        if not isinstance(content, dict):
            raise ValueError(f"{content!r} is no mapping")
        values = _flat(content)
        fields = frozenset(values.items())
        return cls(key, values, fields, frozenset(f for f in fields if f[0].rpartition(".")[2] in _SUBJECT))


class _Stored:
    """All stored specs of a kind, each read and flattened once, by what they are about."""

    def __init__(self, store: Store, kind: StageKind) -> None:
        self.damaged = 0
        self._by_subject: dict[_Fields, list[_Spec]] = {}
        for folder in store.records(kind):
            try:
                spec = _Spec.of(folder.name, json.loads((folder / "spec.json").read_text()))
            except (OSError, ValueError):
                self.damaged += 1
                continue
            self._by_subject.setdefault(spec.subject, []).append(spec)

    def nearest(self, wanted: _Spec) -> _Spec | None:
        """The one with the fewest other fields, of those about the same; where there are none, of those about nearly the same."""
        apart = {subject: _distance(subject, wanted.subject) for subject in self._by_subject}
        least = min(apart.values(), default=0)
        near = [s for subject, specs in self._by_subject.items() if apart[subject] == least for s in specs][:CANDIDATES]
        return min(near, key=lambda s: (_distance(s.fields, wanted.fields), s.key), default=None)


def _distance(one: _Fields, other: _Fields) -> int:
    return len({name for name, _ in one ^ other})


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
