"""Statistics of the inputs of a block's linears, collected while the block runs.

One collector per site (a distinct input). All wanted kinds come from the same forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant.statistics import Statistics
from workers.blocks import tap_inputs
from workers.errors import InputError, NumericalError
from workers.families import Structure
from workers.stream import Call

KINDS = ("hessian", "absmax", "absmean", "samples")
SAMPLE_SEQUENCES = 16
"""Whole sequences kept by `samples`, at most."""
SAMPLE_TOKENS = 8192
"""Tokens kept by `samples`, at most, but one sequence at least: 16 x 512, or 4 x 2048."""


def check_kind(kind: str) -> str:
    """Raises InputError naming the allowed kinds."""
    if kind not in KINDS:
        raise InputError(f"unknown statistic {kind!r}; allowed: {', '.join(KINDS)}")
    return kind


def sample_sequences(sequences: int, length: int) -> int:
    """How many of `sequences` sequences of `length` tokens `samples` keeps: the first ones."""
    return max(1, min(sequences, SAMPLE_SEQUENCES, SAMPLE_TOKENS // length))


@dataclass
class Collector:
    """Of one site. Sums are kept raw in float32 and scaled once, at the end, as GPTQ defines H."""

    kinds: frozenset[str]
    """Of KINDS, and `range` for the least and greatest value."""
    tokens: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    outer: Tensor | None = None
    absmax: Tensor | None = None
    abs_sum: Tensor | None = None
    samples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """x: `[n, K]` tokens of a batch, any floating-point dtype."""
        self.tokens += x.shape[0]
        wide = x.float()
        if "hessian" in self.kinds:
            self.outer = wide.T @ wide if self.outer is None else self.outer.addmm_(wide.T, wide)
        if self.kinds & {"absmax", "absmean"}:
            magnitude = wide.abs()
            top, total = magnitude.amax(0), magnitude.sum(0)
            self.absmax = top if self.absmax is None else torch.maximum(self.absmax, top)
            self.abs_sum = total if self.abs_sum is None else self.abs_sum + total
        if "range" in self.kinds:
            self.low, self.high = min(self.low, float(wide.min())), max(self.high, float(wide.max()))


@dataclass
class BlockStatistics:
    """Of one block, by site name relative to the block."""

    sites: dict[str, Statistics]
    tokens: dict[str, int]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest value, where `range` was wanted."""


def input_sites(structure: Structure, kinds: frozenset[str]) -> tuple[str, ...]:
    """Sites that are observed: every distinct input of linears, and of routers where scale groups read the statistics."""
    routers = structure.routed_inputs() if kinds - {"hessian", "range"} else ()
    return (*(s.linears[0] for s in structure.sites), *routers)


def collect(
    block: nn.Module,
    structure: Structure,
    kinds: frozenset[str],
    calls: list[Call],
    hidden: list[Tensor],
    kept_sequences: int,
    only: Iterable[str] | None = None,
) -> tuple[BlockStatistics, list[Tensor]]:
    """Run the block on all batches: statistics of its sites (or of `only` those), and its outputs.

    `hidden` holds batches `[B, T, K]`, `calls` the block's other arguments for each; `samples` keeps the first
    `kept_sequences` sequences, in the model's own dtype (exact). Raises NumericalError for values that are not finite.
    """
    names = tuple(only) if only is not None else input_sites(structure, kinds)
    collectors = {n: Collector(kinds) for n in names}
    widths: dict[str, int] = {s.linears[0]: s.cols for s in structure.sites}
    widths.update({r: structure.sites[0].cols for r in structure.routed_inputs()})
    position = {"first": 0, "batch": 0, "length": 0}

    def tap(name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        c = collectors[name]
        flat = x.reshape(-1, x.shape[-1])
        c.add(flat)
        keep = kept_sequences - position["first"]
        if "samples" in kinds and keep > 0:
            if tokens is not None:
                c.samples.append(flat[tokens < keep * position["length"]].detach())
            else:
                c.samples.append(flat.view(position["batch"], position["length"], -1)[:keep].detach())
        return x

    taps = tap_inputs(block, names, tap)
    outputs = []
    try:
        with torch.no_grad():
            for call, h in zip(calls, hidden, strict=True):
                position.update(batch=h.shape[0], length=h.shape[1])
                outputs.append(call.run(block, h))
                position["first"] += h.shape[0]
    finally:
        taps.remove()
    sequences = position["first"]
    made = {n: _finish(c, n, structure, sequences, widths[n], hidden[0]) for n, c in collectors.items()}
    ranges = {n: (c.low, c.high) for n, c in collectors.items() if "range" in kinds and c.tokens}
    return BlockStatistics(made, {n: c.tokens for n, c in collectors.items()}, ranges), outputs


def run_block(block: nn.Module, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
    """Outputs of the block on all batches."""
    with torch.no_grad():
        return [call.run(block, h) for call, h in zip(calls, hidden, strict=True)]


def _finish(c: Collector, name: str, structure: Structure, sequences: int, cols: int, like: Tensor) -> Statistics:
    """Zeros, and no sample tokens, where no token reached the site (an expert that was never chosen)."""
    zero = torch.zeros(cols, device=like.device)
    made = Statistics()
    if "hessian" in c.kinds:
        made.hessian = zero.new_zeros(cols, cols) if c.outer is None else c.outer * (2.0 / sequences)
    if "absmax" in c.kinds:
        made.absmax = zero if c.absmax is None else c.absmax
    if "absmean" in c.kinds:
        made.absmean = zero if c.abs_sum is None else c.abs_sum / c.tokens
    if "samples" in c.kinds:
        # Tokens routed to an expert come in no sequences: they form one.
        routed = structure.experts is not None and name.startswith(structure.experts + ".")
        if routed:
            made.samples = torch.cat([s[None] for s in c.samples], 1) if c.samples else like.new_zeros(1, 0, cols)
        else:
            made.samples = torch.cat(c.samples)
    for kind in KINDS:
        value = getattr(made, kind)
        if value is not None and not torch.isfinite(value).all():
            raise NumericalError(
                f"inputs of {name} are not finite during calibration; the model overflows in its dtype, use bfloat16 or float32"
            )
    return made
