"""OmniQuant (Shao et al. 2023, arXiv 2308.13137): learned weight clipping and learned equivalent transform, block by block.

Objective: min over clips (and scales, shifts) of MSE(block(x_q; Q(W)), block(x; W)), x the block's inputs in the unquantized
model, x_q those behind quantized blocks. AdamW without decay, one sequence a step, in order. `aug_loss` adds
MSE(block(x_q; Q(W)), block(x_q; W)). Shapes: weights `[N, K]`, streams `[S, T, K]`, clips `[N, G, 1]`.
Scales and shifts fold into norms, weights and biases; what is stored is an affine tensor per linear.
Departures: float32 instead of float16 with loss scaling; the iterate of least loss is returned (the reference returns
the last one), measured on what is stored after each epoch; scores' scales are tied (`quant.methods.equivalent`); shifts
wherever all biases are there instead of by model name; queries, keys and values are quantized only as the scheme's
activation part says (inputs of linears); symmetric schemes use g_sym; a place with a router is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.adam import Adam
from quant.methods.clipping import Clipping, LearnedClipping
from quant.methods.equivalent import EquivalentTransform, Transformed
from quant.methods.tuner import Best, Tuned, TuningBlocks, sequence_loss
from quant.parameters import Checked
from quant.scheme import Supports


@dataclass(frozen=True)
class OmniQuant(Checked):
    name: ClassVar[str] = "omniquant"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports()
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "block"
    blocks: ClassVar[int] = 1

    lwc: bool = True
    """Learn the clipping of every row or group."""
    let: bool = False
    """Learn scales and shifts. Only where activations are quantized, or norms have biases (OPT)."""
    epochs: int = 10
    """Passes over the calibration text; the paper's tables use 20, and 40 for 2 bits per channel."""
    lwc_lr: float = 1e-2
    let_lr: float = 5e-3
    alpha: float = 0.5
    """First scales: (max |x|)^alpha / (max |w|)^(1 - alpha)."""
    aug_loss: bool = False
    """Also against the unquantized block on the same inputs (2 bits per channel, chat models)."""
    grid: str | None = "omni"
    """A name of `quant.grids`; symmetric schemes use g_sym, None is g_sym or g_asym as the scheme says."""

    @property
    def wants_own_targets(self) -> bool:
        return self.aug_loss

    def tune(self, blocks: TuningBlocks) -> Tuned:
        """The best of the start and the state after each epoch. Raises NonFiniteError."""
        notes: list[str] = []
        let = self._transform(blocks, notes)
        start = _transformed(blocks, let)
        clips = {n: LearnedClipping(n, start.weights[n].detach(), x.scheme, self.grid, self.lwc) for n, x in blocks.linears.items()}
        return train(blocks, clips, let, self.epochs, self.lwc_lr, self.let_lr, notes)

    def _transform(self, blocks: TuningBlocks, notes: list[str]) -> EquivalentTransform | None:
        if not self.let:
            return None
        quantized = blocks.activation is not None
        if not quantized and not any(n.endswith(".bias") for n in blocks.norms):
            notes.append("let is left out: activations are not quantized, and no norm has a bias")
            return None
        return EquivalentTransform(blocks, blocks.places, self.alpha, shift=quantized)


def train(
    blocks: TuningBlocks,
    clips: Mapping[str, Clipping],
    let: EquivalentTransform | None,
    epochs: int,
    lwc_lr: float,
    let_lr: float,
    notes: list[str],
) -> Tuned:
    """AdamW without decay, one sequence a step, in order; the best of the start and the state after each epoch."""

    @torch.no_grad()
    def hard() -> Tuned:
        t = _transformed(blocks, let)
        return Tuned({n: c.hard(t.weights[n]) for n, c in clips.items()}, t.parameters, t.columns, t.rows)

    best = Best(blocks, hard())
    groups = [([p for c in clips.values() for p in c.parameters()], lwc_lr), ([] if let is None else let.parameters(), let_lr)]
    if not any(p for p, _ in groups):
        return best.result([*notes, "there is nothing to learn: lwc and let are both off"])
    optimizer = Adam(groups)
    for epoch in range(epochs):
        for i in range(blocks.quantized.shape[0]):
            t = _transformed(blocks, let)
            changed = {**{f"{n}.weight": c.soft(t.weights[n]) for n, c in clips.items()}, **t.parameters}
            loss = sequence_loss(blocks, changed, slice(i, i + 1))
            if not torch.isfinite(loss):
                return best.result([*notes, f"the loss was not finite in epoch {epoch + 1}: training ended there"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if let is not None:
                let.hold()
        best.offer(f"epoch {epoch + 1}", hard())
    return best.result(notes)


def _transformed(blocks: TuningBlocks, let: EquivalentTransform | None) -> Transformed:
    return Transformed({n: x.weight for n, x in blocks.linears.items()}) if let is None else let.apply()
