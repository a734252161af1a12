"""Learned equivalent transform (OmniQuant, Shao et al. 2023, arXiv 2308.13137, eq. 3-5): channel-wise scales and shifts.

    norm place:    weight / s, bias (b - d) / s;   consumers' bias + W d, then W s
    linear place:  the producer's last rows / s, their bias (b - d) / s;   consumers as above (rows of attention sum to 1)
    scores place:  queries / s, keys s

Every one leaves the block's function as it is, in exact arithmetic. The reference lets the two channels that a rotary
embedding mixes have scales of their own, and with grouped queries gives the scores no scale that fits; here one scale
is shared by such a pair and by all query heads of a key head, which makes this exact there too.
A place is shifted where its producer and all its consumers have biases; nothing is given a bias that it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.methods.tuner import Place, TuningBlocks

LEAST = 1e-2
"""|s| is held at least here."""
EMA = 0.99
"""Share of the old value when the middle of the input's range is averaged over sequences."""


@dataclass
class Transformed:
    """Parameters of the blocks, changed. Differentiable."""

    weights: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


class EquivalentTransform:
    """Scales and shifts of all places of some blocks, as leaf tensors."""

    def __init__(self, blocks: TuningBlocks, places: tuple[Place, ...], alpha: float, shift: bool) -> None:
        self._blocks = blocks
        self.places = tuple(p for p in places if all(n in blocks.linears for n in _linears(p)))
        self.scales: dict[str, Tensor] = {}
        self.shifts: dict[str, Tensor] = {}
        peaks, middles = _observed(blocks, {p.consumers[0] for p in self.places if p.kind != "scores"})
        for p in self.places:
            if p.kind == "scores":
                w = blocks.linears[p.producer].weight
                width = w.shape[0] // p.heads
                self.scales[p.name] = w.new_ones(p.kv_heads, width // 2 if p.rotary else width)
                continue
            w = blocks.linears[_leading(p)].weight
            peak = peaks[p.consumers[0]].to(w)
            widest = w.abs().amax(0).clamp(min=1e-5)
            self.scales[p.name] = (peak.pow(alpha) / widest.pow(1 - alpha)).clamp(min=1e-5)
            if shift and self._has_biases(p):
                self.shifts[p.name] = middles[p.consumers[0]].to(w).clone()
        self.hold()
        for t in self.parameters():
            t.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        return [*self.scales.values(), *self.shifts.values()]

    @torch.no_grad()
    def hold(self) -> None:
        """Keep scales away from 0, after every step."""
        for s in self.scales.values():
            s.copy_(torch.where(s.abs() < LEAST, torch.where(s < 0, -LEAST, LEAST), s))

    def apply(self) -> Transformed:
        """The changed weights and parameters, from those of the blocks and the present scales and shifts."""
        out = Transformed({n: x.weight for n, x in self._blocks.linears.items()})
        for p in self.places:
            if p.kind == "scores":
                self._scores(p, out)
            else:
                self._scale(p, out)
        return out

    def _scale(self, p: Place, out: Transformed) -> None:
        s, shift = self.scales[p.name], self.shifts.get(p.name)
        for name in p.consumers:
            if shift is not None:
                out.parameters[f"{name}.bias"] = self._bias(name, out) + out.weights[name] @ shift
            self._columns(name, s, out)
        if p.kind == "norm":
            weight, bias = f"{p.producer}.weight", f"{p.producer}.bias"
            values = self._blocks.norms
            out.parameters[weight] = (values[weight] + p.norm_offset) / s - p.norm_offset
            if bias in values:
                out.parameters[bias] = (values[bias] if shift is None else values[bias] - shift) / s
            return
        rows = out.weights[p.producer].shape[0]
        self._rows(p.producer, torch.cat([s.new_ones(rows - s.numel()), 1 / s]), out, shift)

    def _scores(self, p: Place, out: Transformed) -> None:
        s = self.scales[p.name]
        if p.rotary:
            s = torch.cat([s, s], -1)
        self._rows(p.producer, 1 / s.repeat_interleave(p.heads // p.kv_heads, 0).flatten(), out)
        self._rows(p.consumers[0], s.flatten(), out)

    def _columns(self, name: str, s: Tensor, out: Transformed) -> None:
        out.weights[name] = out.weights[name] * s
        out.columns[name] = out.columns.get(name, torch.ones_like(s)) * s

    def _rows(self, name: str, factor: Tensor, out: Transformed, shift: Tensor | None = None) -> None:
        out.weights[name] = out.weights[name] * factor[:, None]
        out.rows[name] = out.rows.get(name, torch.ones_like(factor)) * factor
        if self._blocks.linears[name].bias is not None:
            bias = self._bias(name, out)
            if shift is not None:
                bias = bias - torch.cat([shift.new_zeros(bias.numel() - shift.numel()), shift])
            out.parameters[f"{name}.bias"] = bias * factor

    def _bias(self, name: str, out: Transformed) -> Tensor:
        bias = out.parameters.get(f"{name}.bias", self._blocks.linears[name].bias)
        assert bias is not None
        return bias.to(out.weights[name])

    def _has_biases(self, p: Place) -> bool:
        producer = f"{p.producer}.bias" in self._blocks.norms if p.kind == "norm" else self._blocks.linears[p.producer].bias is not None
        return producer and all(self._blocks.linears[n].bias is not None for n in p.consumers)


def _linears(p: Place) -> tuple[str, ...]:
    """Linears that a place changes; all must be tuned."""
    return p.consumers if p.kind == "norm" else (*p.consumers, p.producer)


def _leading(p: Place) -> str:
    """The consumer whose weight the first scale is taken from: query and up projections in the reference."""
    return next((n for n in p.consumers if n.rpartition(".")[2] in ("q_proj", "up_proj")), p.consumers[0])


def _observed(blocks: TuningBlocks, names: set[str]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Of the inputs of linears: largest absolute value, and running average of (max + min) / 2, `[K]` each."""
    peaks: dict[str, Tensor] = {}
    middles: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor) -> None:
        if name not in names or not x.numel():
            return
        low, high = x.amin(0), x.amax(0)
        peak, middle = torch.maximum(low.abs(), high.abs()), (low + high) / 2
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
        middles[name] = EMA * middles[name] + (1 - EMA) * middle if name in middles else middle

    if names:
        blocks.observe(tap)
    return peaks, middles
