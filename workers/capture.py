"""Statistics of the inputs of a block's linears, collected while the block runs.

One collector per site (a distinct input). All wanted kinds come from the same forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant.moments import Moments, MomentSums
from quant.statistics import KINDS, Accumulator, Statistics, accumulator
from workers.blocks import tap_inputs
from workers.errors import InputError, NumericalError
from workers.stream import Call
from workers.structure import Structure

SAMPLE_SEQUENCES = 16
"""Whole sequences kept by `samples`, at most."""
SAMPLE_TOKENS = 8192
"""Tokens kept by `samples`, at most, but one sequence at least: 16 x 512, or 4 x 2048."""

MOMENTS = "moments"
"""A kind beside `quant.statistics.KINDS`: no method reads it (see `workers.site_moments`)."""


def block_file(block: int) -> str:
    """Of a calibrate artifact: one block's tensors."""
    return f"block_{block:04d}.safetensors"


def check_kind(kind: str) -> str:
    """Raises InputError naming the allowed kinds."""
    if kind not in KINDS:
        raise InputError(f"unknown statistic {kind!r}; allowed: {', '.join(KINDS)}, kv, kv_fisher, {MOMENTS}")
    return kind


def sample_sequences(sequences: int, length: int) -> int:
    """How many of `sequences` sequences of `length` tokens `samples` keeps: the first ones."""
    return max(1, min(sequences, SAMPLE_SEQUENCES, SAMPLE_TOKENS // length))


Range = tuple[Tensor, Tensor]
"""Least and greatest value of every channel, `[K]` each."""


class Collector:
    """Of one site, sequence by sequence: how sequences were batched changes nothing."""

    def __init__(self, kinds: frozenset[str], cols: int, device: torch.device, kept_sequences: int, routed: bool) -> None:
        self.tokens = 0
        self.range: Range | None = None
        self._found: dict[str, Accumulator] = {k: accumulator(k, cols, device) for k in KINDS if k in kinds}
        self._samples = self._found.pop("samples", None)
        self._keep = kept_sequences
        self._routed = routed
        self._kept: list[Tensor] = []
        """Tokens that were routed here, of the kept sequences."""
        self._ranges = "range" in kinds
        self.moments = MomentSums() if MOMENTS in kinds else None

    def add(self, tokens: Tensor) -> None:
        """tokens: `[n, K]` of the next sequence, any floating-point dtype; none where a sequence sent none here."""
        self.add_sequences(tokens[None])

    def add_sequences(self, x: Tensor) -> None:
        """x: `[S, T, K]`, the next sequences; the statistics are those of one after the other."""
        sequences, tokens, _ = x.shape
        self.tokens += sequences * tokens
        for part in self._found.values():
            part.update(x)
        if self._samples is not None and self._keep > 0:
            kept = x[: self._keep]
            self._keep -= kept.shape[0]
            if self._routed:
                self._kept += [s.detach().clone() for s in kept]
            else:
                self._samples.update(kept)
        if self.moments is not None:
            for sequence in x:
                self.moments.update(sequence)
        if self._ranges and tokens:
            flat = x.reshape(-1, x.shape[-1])
            low, high = flat.amin(0), flat.amax(0)
            if self.range is not None:
                low, high = torch.minimum(low, self.range[0]), torch.maximum(high, self.range[1])
            self.range = low, high

    def statistics(self) -> Statistics:
        """Zeros, and no sample tokens, where no token came (an expert that was never chosen)."""
        if self._samples is not None and self._kept:
            # Tokens routed to an expert come in no sequences of one length: they form one.
            self._samples.update(torch.cat(self._kept)[None])
            self._kept.clear()
        parts = {**self._found, **({"samples": self._samples} if self._samples is not None else {})}
        return Statistics(**{kind: part.value() for kind, part in parts.items()})


@dataclass
class BlockStatistics:
    """Of one block, by site name relative to the block."""

    sites: dict[str, Statistics]
    tokens: dict[str, int]
    ranges: dict[str, Range] = field(default_factory=dict)
    """Where `range` was wanted and a token came."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Where `moments` was wanted."""


def input_sites(structure: Structure, kinds: frozenset[str]) -> tuple[str, ...]:
    """Sites that are observed: every distinct input of linears, and of routers where scale groups read the statistics."""
    routers = structure.routed_inputs() if kinds - {"hessian", "range"} else ()
    return (*(s.linears[0] for s in structure.sites), *routers)


class _AllSeen(Exception):
    """The last site of a forward was observed, and nobody needs the rest."""


def collect(
    block: nn.Module,
    structure: Structure,
    kinds: frozenset[str],
    calls: list[Call],
    hidden: list[Tensor],
    kept_sequences: int,
    only: Iterable[str] | None = None,
    statistics_alone: bool = False,
) -> tuple[BlockStatistics, list[Tensor]]:
    """Run the block on all batches: statistics of its sites (or of `only` those), and its outputs. statistics_alone: no outputs, and no
    more of the block than its sites need, where each sees every token.

    `hidden` holds batches `[B, T, K]`, `calls` the block's other arguments for each; `samples` keeps the first
    `kept_sequences` sequences, in the model's own dtype (exact). Raises NumericalError for values that are not finite.
    """
    names = tuple(only) if only is not None else input_sites(structure, kinds)
    widths: dict[str, int] = {s.linears[0]: s.cols for s in structure.sites}
    widths.update({r: structure.sites[0].cols for r in structure.routed_inputs()})
    routed = {n for n in names if structure.experts is not None and n.startswith(structure.experts + ".")}
    device = hidden[0].device
    collectors = {n: Collector(kinds, widths[n], device, kept_sequences, n in routed) for n in names}
    shape = [0, 0]
    """Sequences and tokens of the batch that runs."""
    unseen: set[str] = set()

    def tap(name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        unseen.discard(name)
        flat = x.reshape(-1, x.shape[-1])
        if tokens is None:
            collectors[name].add_sequences(flat.view(*shape, -1))
            if statistics_alone and not routed and not unseen:
                raise _AllSeen
            return x
        for i in range(shape[0]):
            collectors[name].add(flat[tokens // shape[1] == i])
        return x

    outputs = []
    with tap_inputs(block, names, tap), torch.no_grad():
        for call, h in zip(calls, hidden, strict=True):
            shape[:] = h.shape[:2]
            unseen.update(names)
            try:
                made = call.run(block, h)
            except _AllSeen:
                continue
            if not statistics_alone:
                outputs.append(made)
            for name in unseen:  # an expert that no token of the batch was sent to; its sequences count all the same
                for _ in range(shape[0]):
                    collectors[name].add(h.new_zeros(0, widths[name]))
            unseen.clear()
    return gathered(collectors), outputs


def gathered(collectors: Mapping[str, Collector]) -> BlockStatistics:
    """Raises NumericalError for values that are not finite."""
    made = {n: _finite(c.statistics(), n) for n, c in collectors.items()}
    ranges = {n: c.range for n, c in collectors.items() if c.range is not None}
    shapes = {n: check_finite(c.moments.value(), f"inputs of {n}") for n, c in collectors.items() if c.moments is not None}
    return BlockStatistics(made, {n: c.tokens for n, c in collectors.items()}, ranges, shapes)


def run_block(block: nn.Module, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
    """Outputs of the block on all batches."""
    with torch.no_grad():
        return [call.run(block, h) for call, h in zip(calls, hidden, strict=True)]


def _finite(made: Statistics, name: str) -> Statistics:
    for kind in KINDS:
        value = getattr(made, kind)
        if value is not None and not torch.isfinite(value).all():
            raise _overflow(f"inputs of {name}")
    return made


def check_finite(found: Moments, what: str) -> Moments:
    """Raises NumericalError where a value was NaN or infinite. `what` is said in the plural."""
    if not math.isfinite(found.absmax):
        raise _overflow(what)
    return found


def _overflow(what: str) -> NumericalError:
    return NumericalError(f"{what} are not finite during calibration; the model overflows in its dtype, use bfloat16 or float32")
