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

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.adam import Adam
from quant.grids import grid
from quant.methods.clipping import LearnedClipping
from quant.methods.equivalent import EquivalentTransform, Transformed
from quant.methods.tuner import Best, Tuned, TuningBlocks, sequence_loss
from quant.scheme import Supports


@dataclass(frozen=True)
class OmniQuant:
    name: ClassVar[str] = "omniquant"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports()
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "block"

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

    def __post_init__(self) -> None:
        if self.grid is not None:
            grid(self.grid)
        if self.epochs < 0 or min(self.lwc_lr, self.let_lr) <= 0 or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"epochs={self.epochs} must be 0 or more, lwc_lr={self.lwc_lr} and let_lr={self.let_lr} positive, "
                f"and alpha={self.alpha} in [0, 1]"
            )

    @property
    def blocks(self) -> int:
        return 1

    @property
    def wants_own_targets(self) -> bool:
        return self.aug_loss

    def tune(self, blocks: TuningBlocks) -> Tuned:
        """The best of the start and the state after each epoch. Raises NonFiniteError."""
        state = _State(self, blocks)
        best = Best(blocks, state.hard())
        groups = [(state.clip_parameters(), self.lwc_lr), (state.let_parameters(), self.let_lr)]
        if not any(p for p, _ in groups):
            return best.result([*state.notes, "there is nothing to learn: lwc and let are both off"])
        optimizer = Adam(groups)
        for epoch in range(self.epochs):
            for i in range(blocks.quantized.shape[0]):
                loss = sequence_loss(blocks, state.soft(), slice(i, i + 1))
                if not torch.isfinite(loss):
                    return best.result([*state.notes, f"the loss was not finite in epoch {epoch + 1}: training ended there"])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                state.hold()
            best.offer(f"epoch {epoch + 1}", state.hard())
        return best.result(state.notes)


class _State:
    """What is learned, and the parameters it makes."""

    def __init__(self, method: OmniQuant, blocks: TuningBlocks) -> None:
        self._blocks = blocks
        self.notes: list[str] = []
        self._let = self._transform(method, blocks)
        start = self._transformed()
        self._clips = {
            n: LearnedClipping(n, start.weights[n].detach(), x.scheme, method.grid, method.lwc) for n, x in blocks.linears.items()
        }

    def _transform(self, method: OmniQuant, blocks: TuningBlocks) -> EquivalentTransform | None:
        if not method.let:
            return None
        quantized = blocks.activation is not None
        if not quantized and not any(n.endswith(".bias") for n in blocks.norms):
            self.notes.append("let is left out: activations are not quantized, and no norm has a bias")
            return None
        return EquivalentTransform(blocks, blocks.places, method.alpha, shift=quantized)

    def _transformed(self) -> Transformed:
        return Transformed({n: x.weight for n, x in self._blocks.linears.items()}) if self._let is None else self._let.apply()

    def clip_parameters(self) -> list[Tensor]:
        return [p for c in self._clips.values() for p in c.parameters()]

    def let_parameters(self) -> list[Tensor]:
        return [] if self._let is None else self._let.parameters()

    def hold(self) -> None:
        if self._let is not None:
            self._let.hold()

    def soft(self) -> dict[str, Tensor]:
        """Differentiable parameters of the blocks."""
        t = self._transformed()
        return {**{f"{n}.weight": c.soft(t.weights[n]) for n, c in self._clips.items()}, **t.parameters}

    @torch.no_grad()
    def hard(self) -> Tuned:
        t = self._transformed()
        return Tuned({n: c.hard(t.weights[n]) for n, c in self._clips.items()}, t.parameters, t.columns, t.rows)
