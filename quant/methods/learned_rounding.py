"""Learned rounding: which of its two neighbours every weight becomes, learned block by block.

Objective: min MSE(block(x_q; Q(W)), block(x; W)), x the block's inputs in the unquantized model, x_q those behind quantized blocks.
autoround (SignRound, Cheng et al. 2023, arXiv 2309.05516): code = round(w / s + v) + z, |v| <= 0.5, and the ends of the range
  times factors in [0, 1]; steps of lr · sign(gradient), lr falling from 1 / iters to 0, on `batch_size` random sequences.
adaround (Nagel et al. 2020, arXiv 2004.10568): code = floor(w / s) + h(v) + z, h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1); Adam on
  hidden · MSE + reg · Σ (1 - |2 h - 1|^β), β from 20 to 2 after a fifth of the steps; what is stored rounds h. Scales are fixed.
Both start at round to nearest. Shapes: weights `[N, K]`, streams `[S, T, K]`, v `[N, G, g]`, factors `[N, G, 1]`.
Departures: the iterate of least loss over all sequences, measured on what is stored at `checks` equal distances (SignRound
compares the losses of its random batches); AdaRound tunes a block at once, as BRECQ does, instead of a layer; float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.adam import Adam
from quant.affine import Affine, grouped
from quant.errors import ScaleDtypeError, require_finite
from quant.grids import DTYPES, affine_of, check_stored, choose_grid
from quant.methods.base import Rounded
from quant.methods.tuner import Best, TunableLinear, Tuned, TuningBlocks, accumulate, checkpoints
from quant.parameters import Checked
from quant.scheme import Supports
from quant.straight_through import affine_through, round_through, scaled_limits
from quant.tensors.affine import AffineTensor

STRETCH = (-0.1, 1.1)
"""Ends of the stretched sigmoid, before it is clipped."""
BETA = (20.0, 2.0)
WARM_UP = 0.2
"""Share of the steps before AdaRound's regularizer counts."""


@dataclass(frozen=True)
class LearnedRounding(Checked):
    name: ClassVar[str] = "learned_rounding"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports()
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "block"
    blocks: ClassVar[int] = 1
    wants_own_targets: ClassVar[bool] = False

    rule: str = "autoround"
    """autoround: signs of gradients on offsets; adaround: Adam on relaxed choices between floor and ceiling."""
    iters: int = 200
    """Steps; AdaRound's paper takes 10,000."""
    lr: float | None = None
    """None: 1 / iters for autoround, 0.01 for adaround."""
    batch_size: int = 8
    """Sequences a step, drawn without replacement."""
    tune_range: bool = True
    """Autoround only: learn the ends of every range too."""
    reg: float = 0.01
    """Adaround only: weight of the regularizer."""
    checks: int = 8
    """Iterates whose stored form is compared, at equal distances, the last among them; the start always is."""
    grid: str | None = None
    """A name of `quant.grids` whose zero is a whole number; None is g_sym or g_asym as the scheme says."""

    def tune(self, blocks: TuningBlocks) -> Tuned:
        """The best of the start and `checks` later iterates. Raises NonFiniteError."""
        linears = {n: _Offsets(n, x, self) for n, x in blocks.linears.items()}

        def hard() -> Tuned:
            return Tuned({n: o.hard() for n, o in linears.items()})

        best, draw = Best(blocks, hard()), blocks.generator()
        sequences = blocks.quantized.shape[0]
        parameters = [p for o in linears.values() for p in o.parameters()]
        adam = Adam([(parameters, self.lr or 0.01)]) if self.rule == "adaround" else None
        marks = checkpoints(self.iters, self.checks)
        times = blocks.targets.shape[-1] if adam is not None else 1

        def soft() -> dict[str, Tensor]:
            return {f"{n}.weight": o.soft() for n, o in linears.items()}

        for step in range(self.iters):
            for p in parameters:
                p.grad = None
            picked = torch.randperm(sequences, generator=draw)[: self.batch_size].to(blocks.quantized.device)
            if not accumulate(blocks, soft, picked, times):
                return best.result([f"the loss was not finite in step {step + 1}: training ended there"])
            if adam is not None:
                self._regularize(linears, step)
                adam.step()
            else:
                _sign_step(parameters, (self.lr or 1 / self.iters) * (1 - step / self.iters))
                for o in linears.values():
                    o.hold()
            if step + 1 in marks:
                best.offer(f"step {step + 1}", hard())
        return best.result([])

    def _regularize(self, linears: dict[str, _Offsets], step: int) -> None:
        progress = (step / self.iters - WARM_UP) / (1 - WARM_UP)
        if progress < 0:
            return
        beta = BETA[0] + (BETA[1] - BETA[0]) * progress
        for o in linears.values():
            term = self.reg * (1 - (2 * o.choice() - 1).abs().pow(beta)).sum()
            term.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _sign_step(parameters: list[Tensor], size: float) -> None:
    for p in parameters:
        if p.grad is not None:
            p.sub_(size * p.grad.sign())


class _Offsets:
    """What is learned of one linear."""

    def __init__(self, name: str, linear: TunableLinear, method: LearnedRounding) -> None:
        require_finite(f"weight {name}", linear.weight)
        self._shape, self._bits = linear.weight.shape, linear.scheme.bits
        self._groups = grouped(linear.weight, linear.scheme)
        self._grid, self._notes = choose_grid(method.grid, linear.scheme)
        self._soft = method.rule == "adaround"
        self._dtype = DTYPES[linear.scheme.scale_dtype]
        w = self._groups
        ends = w.new_ones(*w.shape[:-1], 1)
        self._low, self._high = (ends.clone().requires_grad_(not self._soft and method.tune_range) for _ in range(2))
        self._stored()
        self._v = torch.zeros_like(w)
        if self._soft:
            steps = w / self._affine(hard=True).scale
            share = (steps - steps.floor()).clamp(1e-4, 1 - 1e-4)
            stretched = (share - STRETCH[0]) / (STRETCH[1] - STRETCH[0])
            self._v = torch.logit(stretched)
        self._v.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        return [p for p in (self._v, self._low, self._high) if p.requires_grad]

    @torch.no_grad()
    def hold(self) -> None:
        self._v.clamp_(-0.5, 0.5)
        for p in (self._low, self._high):
            p.clamp_(0, 1)

    def choice(self) -> Tensor:
        """AdaRound's h in [0, 1]: the share of the upper neighbour."""
        return (torch.sigmoid(self._v) * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)

    def soft(self) -> Tensor:
        """`[N, K]`, differentiable; for autoround the values of `hard`."""
        if self._soft:
            a = self._affine(hard=True)
            return a.decode(((self._groups / a.scale).floor() + self.choice() + a.zero).clamp(0, a.top)).view(self._shape)
        return round_through(self._affine(hard=False), self._groups, self._v).view(self._shape)

    @torch.no_grad()
    def hard(self) -> Rounded:
        """What is stored."""
        a = self._stored()
        steps = self._groups / a.scale
        whole = steps.floor() + (self.choice() >= 0.5) if self._soft else (steps + self._v).round()
        tensor = AffineTensor.build((whole + a.zero).clamp(0, a.top).view(self._shape), a.per_group(), self._dtype)
        return Rounded(tensor, notes=list(self._notes))

    def _stored(self) -> Affine:
        """Of `hard`. Scales that do not fit their type are kept in float32 from then on, noted."""
        try:
            return self._affine(hard=True)
        except ScaleDtypeError as e:
            self._dtype = torch.float32
            self._notes.append(f"{e}; scales are stored in float32")
            return self._affine(hard=True)

    def _affine(self, *, hard: bool) -> Affine:
        if not hard:
            return affine_through(self._grid, *scaled_limits(self._grid, self._groups, self._low, self._high), self._bits, self._dtype)
        with torch.no_grad():
            affine = affine_of(self._grid, *scaled_limits(self._grid, self._groups, self._low, self._high), self._bits, self._dtype)
            check_stored(affine, self._groups, self._dtype)
        return affine
