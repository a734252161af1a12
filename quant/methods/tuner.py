"""Protocol of block tuners: quantization learned by gradient, block by block, on calibration text.

A tuner stands where a rounding does: after a method's transforms. It sees one or a few consecutive decoder blocks as a
function of named parameters, the linears to quantize, and two streams of hidden states: what the unquantized model
feeds these blocks, and what the already quantized blocks before them do. It returns the iterate of the least loss on
that text, its start included; losses are of what is stored, not of the relaxation that was trained.
Shapes: streams `[S, T, K]` (sequences, tokens, hidden), weights `[N, K]` (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.errors import NonFiniteError
from quant.methods.base import ANY, Declared, Linear, Rounded
from quant.scheme import ActivationScheme, WeightScheme
from quant.statistics import Statistics

LOSS_TOKENS = 2048
"""Tokens of one forward pass of a loss, one sequence at least. A constant: another would change the last bits of a loss."""


@dataclass
class TunableLinear:
    """A linear to quantize, as the transforms left it."""

    weight: Tensor
    """`[N, K]` float32 or float64; not to be changed in place."""
    scheme: WeightScheme
    bias: Tensor | None = None
    """`[N]`, or None where the linear has none: then it cannot get one."""
    about: Linear = ANY
    statistics: Statistics = field(default_factory=Statistics)
    """Of its input, those that the tuner needs."""


@dataclass(frozen=True)
class Place:
    """Where an input can be scaled, and shifted, with what makes it and what reads it changed to match."""

    name: str
    kind: str
    """norm: a norm makes the input of linears. linear: it is averages (attention) of the last outputs of a linear. scores: queries
    (producer) against keys (the one consumer), whose scales cancel in their products."""
    producer: str
    consumers: tuple[str, ...]
    norm_offset: float = 0.0
    """The norm multiplies by offset + weight."""
    heads: int = 0
    """Of the queries (scores only)."""
    kv_heads: int = 0
    rotary: bool = False
    """Channels i and i + width / 2 of a head are rotated into each other, so that they must share a scale."""


@dataclass
class TuningBlocks:
    """Consecutive decoder blocks, as a tuner sees them."""

    name: str
    linears: dict[str, TunableLinear]
    """By full module path, in the order of the forward pass. Other linears are left as they are."""
    inputs: Tensor
    """Of the unquantized model."""
    quantized: Tensor
    """Of the model whose blocks before these are quantized; what is trained on."""
    targets: Tensor
    """What the unquantized blocks make of `inputs`."""
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """(changed parameters, hidden states `[B, T, K]`) ▸ `[B, T, K]`, differentiable in both. Keys are `<module path>.weight` (`[N, K]`
    of linears, whatever their storage) and `<module path>.bias`. Parameters that are not given are as the transforms left them. Inputs
    of `linears` are fake-quantized where there is an activation scheme."""
    own_targets: Tensor | None = None
    """What the unquantized blocks make of `quantized`, for tuners that ask for it."""
    norms: dict[str, Tensor] = field(default_factory=dict)
    """`<module path>.<weight or bias>` ▸ values of norms, float32 or float64."""
    places: tuple[Place, ...] = ()
    observe: Callable[[Callable[[str, Tensor], None]], None] = lambda tap: None
    """Runs the unquantized blocks, as the transforms left them, on `inputs`: `tap(linear, its input [T, K])` for every sequence
    and the first linear of each distinct input."""
    activation: ActivationScheme | None = None
    """Fake-quantized at run time; only for tuners that read it, with dynamic ranges."""
    count: int | None = None
    """Decoder blocks; the last of a model may be fewer than asked for. None for a linear alone."""
    seed: int = 0
    """Of the stage; zero for tuners that do not declare uses_seed."""

    def generator(self) -> torch.Generator:
        """On the CPU, of these blocks alone."""
        return Linear(self.name, self.seed).generator()


@dataclass
class Tuned:
    """What a tuner returns: one iterate."""

    tensors: dict[str, Rounded]
    """By name, for every linear of the blocks."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Changed norms and biases, with the names of `TuningBlocks.forward`."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Linear ▸ factors `[K]` that its columns were multiplied by, so that its error can be told in the old terms."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Linear ▸ factors `[N]` of its rows."""
    iterate: str = "start"
    """Which one this is."""
    loss: float = float("inf")
    """Of this iterate, per value of the output."""
    start: float = float("inf")
    """Loss of the start."""
    notes: list[str] = field(default_factory=list)

    def changed(self) -> dict[str, Tensor]:
        """As `TuningBlocks.forward` takes it, weights dequantized from what is stored."""
        return {**{f"{n}.weight": r.tensor.dequantize() for n, r in self.tensors.items()}, **self.parameters}


class BlockTuner(Declared, Protocol):
    """blocks ▸ stored tensors, and changed norms and biases. `needs` are statistics that it is given besides the streams."""

    feeds_text: ClassVar[bool]
    """True: the quantize stage runs calibration text, whatever the propagation of the transforms' statistics."""
    working_set: ClassVar[str]
    """block, or blocks(n) with the parameter's name for n: what must be in memory at once, besides the streams."""

    @property
    def blocks(self) -> int:
        """Consecutive decoder blocks that are tuned together."""

    @property
    def wants_own_targets(self) -> bool:
        """`TuningBlocks.own_targets` is needed."""

    def tune(self, blocks: TuningBlocks) -> Tuned:
        """The iterate of least `blocks_loss`, the start included. Raises NonFiniteError for a start that is not finite."""


def sequence_loss(blocks: TuningBlocks, changed: Mapping[str, Tensor], picked: slice | Tensor) -> Tensor:
    """Mean squared difference from the targets over the sequences picked, in both terms where there are own targets."""
    out = blocks.forward(changed, blocks.quantized[picked])
    loss = F.mse_loss(out, blocks.targets[picked].to(out))
    if blocks.own_targets is not None:
        loss = loss + F.mse_loss(out, blocks.own_targets[picked].to(out))
    return loss


@torch.no_grad()
def blocks_loss(blocks: TuningBlocks, changed: Mapping[str, Tensor]) -> float:
    """Mean of `sequence_loss` over all sequences."""
    count, length = blocks.quantized.shape[:2]
    step = max(1, LOSS_TOKENS // length)
    total = 0.0
    for first in range(0, count, step):
        last = min(count, first + step)
        total += (last - first) * float(sequence_loss(blocks, changed, slice(first, last)))
    return total / count


def accumulate(blocks: TuningBlocks, soft: Callable[[], Mapping[str, Tensor]], picked: Tensor, times: float = 1.0) -> bool:
    """Adds the gradients of `times` the mean of `sequence_loss` over the sequences picked, LOSS_TOKENS of them at once, each time with
    weights anew from `soft`. False, and no more gradients, where a loss is not finite."""
    for part in torch.split(picked, max(1, LOSS_TOKENS // blocks.quantized.shape[1])):
        loss = sequence_loss(blocks, soft(), part)
        if not torch.isfinite(loss):
            return False
        (part.numel() / picked.numel() * times * loss).backward()  # type: ignore[no-untyped-call]
    return True


def checkpoints(steps: int, checks: int) -> set[int]:
    """After which of the steps 1, 2, ... an iterate is offered: `checks` at equal distances, the last among them."""
    return {round(steps * (i + 1) / checks) for i in range(checks)}


class Best:
    """Keeps the iterate of least loss; of equals the first."""

    def __init__(self, blocks: TuningBlocks, start: Tuned) -> None:
        self._blocks = blocks
        self.kept = start
        start.loss = start.start = blocks_loss(blocks, start.changed())
        if not torch.isfinite(torch.tensor(start.loss)):
            raise NonFiniteError(
                f"{blocks.name}: the loss before tuning is {start.loss}; the model overflows in its dtype, use bfloat16 or float32"
            )

    def offer(self, iterate: str, tuned: Tuned) -> None:
        """Not finite is never better."""
        tuned.loss = blocks_loss(self._blocks, tuned.changed())
        tuned.start, tuned.iterate = self.kept.start, iterate
        if tuned.loss < self.kept.loss:
            self.kept = tuned

    def result(self, notes: list[str]) -> Tuned:
        """The iterate that was kept, with notes, and in each linear's record which one it is and its losses."""
        kept = self.kept
        for rounded in kept.tensors.values():
            rounded.details.update(_facts(kept))
        kept.notes += notes
        return kept


def _facts(tuned: Tuned) -> dict[str, Any]:
    return {"iterate": tuned.iterate, "loss": tuned.loss, "start_loss": tuned.start}
