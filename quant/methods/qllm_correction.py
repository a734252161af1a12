"""QLLM's efficient error correction (Liu et al. 2023, arXiv 2310.08041, section 4.3): low-rank terms inside the weights' quantizer.

Objective: min over A, B and norms of MSE(blocks(x_q; Q(W + s B A)), blocks(x; W)), x what the unquantized model feeds `blocks`
consecutive blocks, x_q what the quantized one does. A `[rank, K]` is uniform in ±1 / sqrt(K) (Kaiming, as LoRA starts), B `[N, rank]` zero,
s = alpha / rank. AdamW without decay, one sequence a step, in order, the learning rate falling linearly to zero. The weights are stored
as Q(W + s B A): nothing is left of the correction at run time.
Shapes: weights `[N, K]`, streams `[S, T, hidden]`.
Departures: the iterate of least loss is returned, start included (the reference returns the last); the last blocks of a model whose
number `blocks` does not divide are tuned too (`remainder=False`: they are only rounded, as in the reference); norms get no new biases,
and the final norm, which no block's output shows, is not trained; float32 instead of bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.adam import Adam
from quant.methods.base import Rounded
from quant.methods.clipping import LearnedClipping
from quant.methods.tuner import Best, TunableLinear, Tuned, TuningBlocks, sequence_loss
from quant.parameters import Checked
from quant.scheme import Supports


@dataclass(frozen=True)
class QllmCorrection(Checked):
    name: ClassVar[str] = "qllm_correction"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports()
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "blocks(blocks)"
    wants_own_targets: ClassVar[bool] = False

    rank: int = 4
    alpha: float = 1.0
    """The correction counts alpha / rank times."""
    blocks: int = 4
    """Consecutive decoder blocks that are tuned together."""
    epochs: int = 10
    """Passes over the calibration text."""
    lr: float = 5e-4
    """First learning rate; the paper's Llama-2 7B and 70B use 1e-4."""
    norms: bool = True
    """Train weights (and biases, where there are any) of norms too."""
    remainder: bool = True
    """Tune the last blocks where `blocks` does not divide their number; False: round them only, as the reference does."""
    grid: str | None = "omni"
    """A name of `quant.grids`; symmetric schemes use g_sym, None is g_sym or g_asym as the scheme says."""

    def tune(self, blocks: TuningBlocks) -> Tuned:
        """The best of the start and the state after each epoch. Raises NonFiniteError."""
        generator = blocks.generator()
        parts = {n: _Corrected(n, x, self, generator) for n, x in blocks.linears.items()}
        # Norms that stay as they are stay out of the recipe.
        start = Tuned({n: p.hard() for n, p in parts.items()})
        best = Best(blocks, start)
        if blocks.count is not None and blocks.count < self.blocks and not self.remainder:
            return best.result([f"rounded only: {blocks.count} of {self.blocks} blocks are left, and remainder=false"])
        norms = {n: p.detach().clone().requires_grad_() for n, p in blocks.norms.items()} if self.norms else {}
        optimizer = Adam([([*(t for p in parts.values() for t in (p.a, p.b)), *norms.values()], self.lr)])
        count = blocks.quantized.shape[0]
        for epoch in range(self.epochs):
            for i in range(count):
                loss = sequence_loss(blocks, {**{f"{n}.weight": p.soft() for n, p in parts.items()}, **norms}, slice(i, i + 1))
                if not torch.isfinite(loss):
                    return best.result([f"the loss was not finite in epoch {epoch + 1}: training ended there"])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step(1 - (epoch * count + i) / (self.epochs * count))
            tensors = {n: p.hard() for n, p in parts.items()}
            best.offer(f"epoch {epoch + 1}", Tuned(tensors, {n: p.detach().clone() for n, p in norms.items()}))
        return best.result([])


class _Corrected:
    """One linear: its weight, correction and quantizer."""

    def __init__(self, name: str, linear: TunableLinear, method: QllmCorrection, generator: torch.Generator) -> None:
        w = linear.weight.detach()
        self._weight, self._share = w, method.alpha / method.rank
        self._quantizer = LearnedClipping(name, w, linear.scheme, method.grid, learn=False)
        uniform = 2 * torch.rand(method.rank, w.shape[1], generator=generator, dtype=torch.float64) - 1
        self.a = (uniform / w.shape[1] ** 0.5).to(w).requires_grad_()
        self.b = torch.zeros(w.shape[0], method.rank, dtype=w.dtype, device=w.device, requires_grad=True)

    def _corrected(self) -> Tensor:
        corrected: Tensor = self._weight + self._share * (self.b @ self.a)
        return corrected

    def soft(self) -> Tensor:
        return self._quantizer.soft(self._corrected())

    @torch.no_grad()
    def hard(self) -> Rounded:
        return self._quantizer.hard(self._corrected())
