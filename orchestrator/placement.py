"""Which ready stage goes to which free slot.

Two wishes pull against each other: the stage with the most work behind it should start early (rank), and a stage should run
where its model or quantized variant is already loaded (affinity). Rank alone multiplies model loads; affinity alone leaves
the longest chain for last. The rule here:

* The time left is at least T = max(longest chain, work left / slots). While a stage's own chain is much shorter than T it can
  wait without harm. A ready stage with rank >= (1 - slack) T is urgent and goes first, to the best slot for it.
* Without an urgent stage the cheapest pair of slot and stage goes first (`Level`): the slot holds the variant; it holds the
  model; it would have to load what no one holds; and, last, taking a stage away from a slot that holds its variant or model.
  These two keep a slot from idling while another one has a queue; models share the slots by the work they have.
* Among equals the order of the sweep decides, so that variants are finished one after the other and results come early.

A worker keeps one model and `variants_per_slot` quantized models that evaluations loaded.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from orchestrator.stage import Stage


class Level(IntEnum):
    """Cost of running a stage on a slot, least first."""

    VARIANT_HELD = 0
    MODEL_HELD = 1
    VARIANT_HELD_ELSEWHERE = 2
    """This slot holds the model, another one already has the variant."""
    LOAD_MODEL = 3
    MODEL_HELD_ELSEWHERE = 4


class Urgency(NamedTuple):
    """Sorts the stage with the highest rank first."""

    negative_rank_s: float
    order: int
    key: str


class Turn(NamedTuple):
    """Sorts by the order of the sweep."""

    order: int
    key: str


class Group:
    """Ready stages that need the same things loaded."""

    def __init__(self) -> None:
        self.by_rank: list[Urgency] = []
        self.by_order: list[Turn] = []


class ReadyQueue:
    """Ready stages, grouped by affinity."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, ...], Group] = {}
        self.model_work_s: defaultdict[str, float] = defaultdict(float)
        """Model ▸ estimated seconds of its ready stages."""
        self._entries: dict[str, tuple[Stage, Urgency]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._entries))

    def add(self, stage: Stage, rank_s: float, order: int) -> None:
        """Put a stage in, or its new rank."""
        self.discard(stage.key)
        entry = Urgency(-rank_s, order, stage.key)
        group = self.groups.setdefault(stage.affinity, Group())
        insort(group.by_rank, entry)
        insort(group.by_order, Turn(order, stage.key))
        self._entries[stage.key] = (stage, entry)
        self.model_work_s[stage.model] += stage.resources.seconds

    def discard(self, key: str) -> None:
        found = self._entries.pop(key, None)
        if found is None:
            return
        stage, entry = found
        self.model_work_s[stage.model] -= stage.resources.seconds
        group = self.groups[stage.affinity]
        group.by_rank.remove(entry)
        group.by_order.remove(Turn(entry.order, key))
        if not group.by_rank:
            del self.groups[stage.affinity]

    def most_urgent(self) -> tuple[tuple[str, ...], Urgency] | None:
        return min(((affinity, g.by_rank[0]) for affinity, g in self.groups.items()), key=lambda pair: pair[1], default=None)


@dataclass
class Slot:
    """What a worker holds, as far as what it ran tells."""

    model: str | None = None
    variants: list[str] = field(default_factory=list)
    """Least recently used first."""

    @property
    def held(self) -> list[str]:
        return [*self.variants, self.model] if self.model else []

    def ran(self, stage: Stage, variants_kept: int) -> None:
        if stage.model != self.model:
            self.variants.clear()
            self.model = stage.model
        variant = stage.inputs.get("quantize")
        if variant:
            self.variants = [v for v in self.variants if v != variant] + [variant]
            del self.variants[: max(0, len(self.variants) - variants_kept)]


class Holdings:
    """What all slots hold, and the choice that follows from it."""

    def __init__(self, slots: int, variants_per_slot: int) -> None:
        self._slots = {i: Slot() for i in range(slots)}
        self._variants_per_slot = variants_per_slot
        self._holders: Counter[str] = Counter()
        """Model or variant ▸ number of slots that hold it."""

    @property
    def slots(self) -> Collection[int]:
        return self._slots.keys()

    def ran(self, slot: int, stage: Stage) -> None:
        if slot in self._slots:
            self._holders.subtract(self._slots[slot].held)
            self._slots[slot].ran(stage, self._variants_per_slot)
            self._holders.update(self._slots[slot].held)

    def reset(self, slot: int) -> None:
        """The slot has a new worker."""
        if slot in self._slots:
            self._holders.subtract(self._slots[slot].held)
            self._slots[slot] = Slot()

    def remove(self, slot: int) -> None:
        self.reset(slot)
        self._slots.pop(slot, None)

    def level(self, slot: int, affinity: tuple[str, ...]) -> Level:
        """`affinity`: (model,) or (variant, model)."""
        here, model = self._slots[slot], affinity[-1]
        variant = affinity[0] if len(affinity) > 1 else None
        if here.model != model:
            return Level.MODEL_HELD_ELSEWHERE if self._holders[model] else Level.LOAD_MODEL
        if variant is None:
            return Level.MODEL_HELD
        if variant in here.variants:
            return Level.VARIANT_HELD
        return Level.VARIANT_HELD_ELSEWHERE if self._holders[variant] else Level.MODEL_HELD

    def choose(self, free: Collection[int], ready: ReadyQueue, time_left_s: float, slack: float) -> tuple[int, str] | None:
        """(slot, key) of the next stage to start, or `None` when nothing is ready or no slot is free."""
        usable = sorted(set(free) & self._slots.keys())
        urgent = ready.most_urgent()
        if not usable or urgent is None:
            return None
        affinity, first = urgent
        if -first.negative_rank_s >= (1 - slack) * time_left_s:
            return min(usable, key=lambda slot: (self.level(slot, affinity), slot)), first.key
        held = [
            (g.by_order[0], slot) for slot in usable for v in self._slots[slot].variants if (g := ready.groups.get(self._pair(slot, v)))
        ]
        if held:
            turn, slot = min(held)
            return slot, turn.key
        # Of slots that hold the same, one stands for all.
        distinct = {tuple(self._slots[slot].held): slot for slot in reversed(usable)}.values()
        _, _, turn, slot = min((*self._cost(slot, a, ready), g.by_order[0], slot) for slot in distinct for a, g in ready.groups.items())
        return slot, turn.key

    def _pair(self, slot: int, variant: str) -> tuple[str, ...]:
        """The affinity of stages for which this slot has everything."""
        return (variant, str(self._slots[slot].model))

    def _cost(self, slot: int, affinity: tuple[str, ...], ready: ReadyQueue) -> tuple[Level, float]:
        """A slot that must load what others hold joins the model with the fewest slots for its work."""
        level, model = self.level(slot, affinity), affinity[-1]
        crowd = self._holders[model] / max(1e-9, ready.model_work_s[model]) if level is Level.MODEL_HELD_ELSEWHERE else 0.0
        return level, crowd
