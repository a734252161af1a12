"""What the families' table says of a model: its blocks, sites, linears and scale groups. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """A quantizable linear, y = W x, W `[rows, cols]`."""

    name: str
    block: int
    rows: int
    cols: int
    site: str
    """Name of the first linear that shares its input."""


@dataclass(frozen=True)
class Site:
    """Linears of a block that read one input. Names are relative to the block."""

    linears: tuple[str, ...]
    rows: tuple[int, ...]
    cols: int


@dataclass(frozen=True)
class ScaleRule:
    """A group of linears whose shared input can be divided by a scale."""

    name: str
    producer: str | None
    """Norm, or linear whose last outputs are this input; None where nothing can take the scale."""
    producer_kind: str
    """norm, linear or none."""
    consumers: tuple[str, ...]
    inspect: tuple[str, ...]
    """Modules that read the input; the sum of their outputs shows the effect. A linear inspects itself."""
    routers: tuple[str, ...] = ()
    """Modules with a `weight [*, K]` that read the same input, are scaled along, and are never quantized."""
    reason: str | None = None
    """Why the group must be left alone; None where it may be scaled."""

    @property
    def input(self) -> str:
        """Module whose input is the group's shared input."""
        return self.routers[0] if self.routers else self.consumers[0]


@dataclass(frozen=True)
class Scores:
    """Separate linears for queries and keys, whose outputs meet in attention scores only."""

    queries: str
    keys: str
    heads: int
    kv_heads: int
    rotary: bool
    """Channels i and i + width / 2 of a head are rotated into each other."""


@dataclass(frozen=True)
class Structure:
    """Of one model."""

    model_type: str
    blocks: str
    """Module path of the list of decoder blocks."""
    count: int
    sites: tuple[Site, ...]
    """Of every block, in true-sequential order."""
    groups: tuple[ScaleRule, ...]
    attention: str
    """Attention module of a block."""
    cache_argument: str
    """Keyword under which the attention module receives its key-value cache; empty where there is none."""
    outputs: int = 1
    """Values that a block returns; where there are several the hidden states are the first."""
    norm_offset: float = 0.0
    """A norm multiplies by offset + weight (1 for Gemma)."""
    scores: Scores | None = None
    """None where queries and keys are one fused linear."""
    experts: str | None = None
    """Module that holds 3-D expert tensors."""

    def path(self, block: int, name: str) -> str:
        return f"{self.blocks}.{block}.{name}"

    def linear_names(self) -> tuple[str, ...]:
        """Relative names, in true-sequential order."""
        return tuple(n for s in self.sites for n in s.linears)

    def routed_inputs(self) -> tuple[str, ...]:
        """Inputs of routers: sites that only scale groups need."""
        return tuple(r for g in self.groups for r in g.routers)
