"""ZeroQuant (Yao et al. 2022, arXiv 2206.01861): weights on a symmetric grid in groups, activations per token, and layer-by-layer
knowledge distillation (LKD).

Objective, block by block: min over W of MSE(block(x; Q(W)), block(x; W0)), W0 the unquantized weights, Q rounding to nearest, x what the
unquantized blocks before make of the text, so that teacher and student share all but one block. Inputs of the student's linears are
quantized as the scheme says (w4a8_g64, w8a8), the teacher's never are. Adam on master weights; the scale is that of the weights as they
are now, and rounding passes gradients on unchanged. `iters: 0` is ZeroQuant without LKD: round to nearest, bit for bit RTN on the same
grid.
Shapes: weights `[N, K]`, streams `[S, T, hidden]`, scales `[N, G]`. Losses are per value of the block's output.
Defaults: 100 steps of 5e-6 on 32 sequences are those of the authors' script for BERT. Ours: `checks`, and the seeded draw of
batches.
Departures: the iterate of least loss over all sequences, measured on what is stored at `checks` equal distances, the start among them
(the script keeps the last); `stream: quantized` is ours, x of the quantized blocks before, for student and teacher; only the weights
of quantized linears are trained, without decay (the script: biases and norms too, decay 0.01 of weights); the grid is q_sym, whose step
is max|w| / (2^(b-1) - 1) (DeepSpeed's quantizer divides by 2^(b-1) and cuts the largest weight off); float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quant.adam import Adam
from quant.errors import require_finite
from quant.grids import choose_grid, round_weight
from quant.methods.rtn import Rtn
from quant.methods.tuner import Best, Tuned, TuningBlocks, accumulate, checkpoints
from quant.parameters import Checked
from quant.scheme import Supports
from quant.straight_through import through


@dataclass(frozen=True)
class ZeroQuant(Checked):
    name: ClassVar[str] = "zeroquant"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports()
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "block"
    blocks: ClassVar[int] = 1

    iters: int = 100
    """Steps of distillation; 0: round to nearest."""
    lr: float = 5e-6
    """Of Adam, constant."""
    batch_size: int = 32
    """Sequences a step, drawn without replacement; all where there are fewer."""
    checks: int = 8
    """Iterates whose stored form is compared, at equal distances, the last among them; the start always is."""
    stream: str = "original"
    """What student and teacher are fed: outputs of the unquantized blocks before, or of the quantized ones."""
    grid: str | None = "q_sym"
    """A name of `quant.grids`; None is g_sym or g_asym as the scheme says."""

    @property
    def wants_own_targets(self) -> bool:
        return self.stream == "quantized"

    def tune(self, blocks: TuningBlocks) -> Tuned:
        """The best of round to nearest and `checks` later iterates. Raises NonFiniteError."""
        for name, linear in blocks.linears.items():
            require_finite(f"weight {name}", linear.weight)
        taught, rounding = self._taught(blocks), Rtn(self.grid)
        masters = {n: x.weight.detach().clone().requires_grad_() for n, x in blocks.linears.items()}

        def hard() -> Tuned:
            return Tuned({n: rounding.quantize(masters[n], x.statistics, x.scheme, x.about) for n, x in blocks.linears.items()})

        def soft() -> dict[str, Tensor]:
            return {f"{n}.weight": self._soft(masters[n], blocks, n) for n in masters}

        best, draw = Best(taught, hard()), blocks.generator()
        optimizer, marks = Adam([(list(masters.values()), self.lr)]), checkpoints(self.iters, self.checks)
        for step in range(1, self.iters + 1):
            optimizer.zero_grad()
            picked = torch.randperm(taught.quantized.shape[0], generator=draw)[: self.batch_size].to(taught.quantized.device)
            if not accumulate(taught, soft, picked):
                return best.result([f"the loss was not finite in step {step}: training ended there"])
            optimizer.step()
            if step in marks:
                if not all(bool(torch.isfinite(w).all()) for w in masters.values()):
                    return best.result([f"weights were not finite after step {step}: training ended there"])
                best.offer(f"step {step}", hard())
        return best.result([])

    def _taught(self, blocks: TuningBlocks) -> TuningBlocks:
        """With the teacher's outputs as targets, on the inputs that the student is trained on."""
        if self.stream == "original":
            return replace(blocks, quantized=blocks.inputs, own_targets=None)
        # A linear alone has one input for both.
        return blocks if blocks.own_targets is None else replace(blocks, targets=blocks.own_targets, own_targets=None)

    def _soft(self, master: Tensor, blocks: TuningBlocks, name: str) -> Tensor:
        """`[N, K]`: the values that `hard` stores, with the gradient of the master weight."""
        scheme = blocks.linears[name].scheme
        chosen, _ = choose_grid(self.grid, scheme)
        return through(master, round_weight(chosen, master.detach().float(), scheme).to(master))
