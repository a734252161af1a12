"""Whole runs of the tuners against the papers' steps written anew with torch's autograd and optimizers: every epoch's loss, the iterate
kept and what is stored.

Both compute in float64. What is stored has float32 values, 2^-24 of themselves apart from the reference's; a code that fell to the other
side would be a step off, hundreds of times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant.methods.learned_rounding import LearnedRounding
from quant.methods.omniquant import OmniQuant
from quant.methods.qllm_correction import QllmCorrection
from quant.methods.tuner import Tuned
from quant.scheme import ActivationScheme
from tests.quant.test_tuners import G8, norm_block, random

NAMES = {"norm.weight": "g", "norm.bias": "h", "up.weight": "u", "up.bias": "b", "down.weight": "d", "down.bias": "c"}
Parts = dict[str, Tensor]
TOP, SIZE = 7, 8


class Straight(torch.autograd.Function):
    """f(x) with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return f(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def nearest(x: Tensor) -> Tensor:
    rounded: Tensor = Straight.apply(x, torch.round)  # type: ignore[no-untyped-call]
    return rounded


def as_stored(x: Tensor) -> Tensor:
    cast: Tensor = Straight.apply(x, lambda t: t.float().double())  # type: ignore[no-untyped-call]
    return cast


class Reference:
    """Streams, weights, and the best of all iterates offered."""

    def __init__(self) -> None:
        blocks = norm_block()
        self.inputs, self.stream, self.targets = blocks.inputs, blocks.quantized, blocks.targets
        self.own: Tensor | None = None
        self.losses: list[float] = []
        self.given: Parts = {k: _value(blocks, n) for n, k in NAMES.items()}
        self.kept: Parts = {}

    def block(self, p: Parts, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        inner = (x - mean) / (var + 1e-5).sqrt() * p["g"] + p["h"]
        return x + (inner @ p["u"].T + p["b"]).relu() @ p["d"].T + p["c"]

    def loss(self, p: Parts, picked: Any) -> Tensor:
        out = self.block(p, self.stream[picked])
        loss = (out - self.targets[picked]).square().mean()
        return loss if self.own is None else loss + (out - self.own[picked]).square().mean()

    @torch.no_grad()
    def offer(self, p: Parts) -> None:
        self.losses.append(float(self.loss(p, slice(None))))
        if self.losses[-1] == min(self.losses) and self.losses.count(self.losses[-1]) == 1:
            self.kept = {k: v.detach().clone() for k, v in p.items()}

    def descend(self, changed: Callable[[], Parts], optimizer: torch.optim.Optimizer, epochs: int, after: Callable[[], None]) -> None:
        """A step a sequence, then `after`; each epoch's iterate is offered, and the start."""
        self.offer(changed())
        for _ in range(epochs):
            for i in range(len(self.stream)):
                optimizer.zero_grad()
                self.loss(changed(), slice(i, i + 1)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                after()
            self.offer(changed())

    def hold(self, tuned: Tuned, iterates: list[str]) -> None:
        """The stored iterate is the reference's."""
        assert tuned.start == pytest.approx(self.losses[0], rel=1e-6)
        assert tuned.loss == pytest.approx(min(self.losses), rel=1e-6)
        assert tuned.iterate == iterates[self.losses.index(min(self.losses))]
        assert tuned.iterate != "start"
        for name, value in tuned.changed().items():
            torch.testing.assert_close(value.double(), self.kept[NAMES[name]], rtol=1e-6, atol=1e-7)


def _value(blocks: Any, name: str) -> Tensor:
    module, _, parameter = name.rpartition(".")
    if name in blocks.norms:
        return blocks.norms[name].clone()  # type: ignore[no-any-return]
    linear = blocks.linears[module]
    return (linear.weight if parameter == "weight" else linear.bias).clone()  # type: ignore[no-any-return]


def groups(w: Tensor) -> Tensor:
    return w.view(w.shape[0], -1, SIZE)


def rounded(w: Tensor, low: Tensor, high: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """(clamp(⌊w / s + offset⌉ + z, 0, 7) - z) s in groups `[N, G, 1]` of ranges, straight through."""
    s = as_stored((high - low) / TOP)
    z = nearest(-low / s)
    return (((nearest(groups(w) / s + offset) + z).clamp(0, TOP) - z) * s).view(w.shape)


def ends(w: Tensor) -> tuple[Tensor, Tensor]:
    return groups(w).amin(-1, keepdim=True), groups(w).amax(-1, keepdim=True)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("rates", [(0.05, 0.02), (0.3, 0.3)])
def test_omniquant(rates: tuple[float, float], augmented: bool) -> None:
    """Eq. 2 (clipping), 3 and 4 (scales and shifts of the norm), and both terms of the loss."""
    r = Reference()
    p, epochs = r.given, 6
    with torch.no_grad():
        r.own = r.block(p, r.stream) if augmented else None
        inner = F.layer_norm(r.inputs, (16,)) * p["g"] + p["h"]
        s = inner.abs().amax((0, 1)).sqrt() / p["u"].abs().amax(0).sqrt()
        shift = (inner[0].amax(0) + inner[0].amin(0)) / 2
        for x in inner[1:]:
            shift = 0.99 * shift + 0.01 * (x.amax(0) + x.amin(0)) / 2
    clips = {n: [torch.full_like(ends(p[n])[0], 4.0).requires_grad_() for _ in range(2)] for n in "ud"}
    s.requires_grad_(), shift.requires_grad_()

    def changed() -> Parts:
        moved = {**p, "g": p["g"] / s, "h": (p["h"] - shift) / s, "b": p["b"] + p["u"] @ shift, "u": p["u"] * s}
        for n, (lower, upper) in clips.items():
            low, high = ends(moved[n])
            moved[n] = rounded(moved[n], torch.sigmoid(lower) * low, torch.sigmoid(upper) * high)
        return moved

    optimizer = torch.optim.AdamW(
        [{"params": [t for c in clips.values() for t in c], "lr": rates[0]}, {"params": [s, shift], "lr": rates[1]}], weight_decay=0
    )

    @torch.no_grad()
    def away_from_0() -> None:
        s.copy_(torch.where(s.abs() < 1e-2, 1e-2 * torch.where(s < 0, -1.0, 1.0), s))

    r.descend(changed, optimizer, epochs, away_from_0)

    # `norm_block` does not round its inputs: the scheme only lets the transform learn shifts.
    blocks = norm_block(G8, ActivationScheme(8, symmetric=False))
    blocks.own_targets = r.own
    tuned = OmniQuant(let=True, epochs=epochs, lwc_lr=rates[0], let_lr=rates[1], aug_loss=augmented).tune(blocks)
    assert set(tuned.parameters) == {"norm.weight", "norm.bias", "up.bias"}
    r.hold(tuned, ["start", *(f"epoch {e + 1}" for e in range(epochs))])


@pytest.mark.parametrize(("batch", "lr"), [(4, None), (2, None), (1, 0.02)])
def test_autoround(batch: int, lr: float | None) -> None:
    """SignSGD on offsets and range factors, the rate falling linearly (algorithm 1 of the paper)."""
    r, steps = Reference(), 40
    p, draw = r.given, norm_block().generator()
    learned = {n: [torch.zeros_like(groups(p[n])), *(torch.ones_like(ends(p[n])[0]) for _ in range(2))] for n in "ud"}
    every = [t.requires_grad_() for of in learned.values() for t in of]

    def changed() -> Parts:
        out = dict(p)
        for n, (v, alpha, beta) in learned.items():
            low, high = ends(p[n])
            out[n] = rounded(p[n], (low * alpha).clamp(max=0), (high * beta).clamp(min=0), v)
        return out

    r.offer(changed())
    for step in range(steps):
        picked = torch.randperm(4, generator=draw)[:batch]
        gradients = torch.autograd.grad(r.loss(changed(), picked), every)
        with torch.no_grad():
            for t, gradient in zip(every, gradients, strict=True):
                t -= (lr or 1 / steps) * (steps - step) / steps * gradient.sign()
            for v, alpha, beta in learned.values():
                v.clamp_(-0.5, 0.5), alpha.clamp_(0, 1), beta.clamp_(0, 1)
        if step % 5 == 4:
            r.offer(changed())
    tuned = LearnedRounding(iters=steps, batch_size=batch, lr=lr, checks=8).tune(norm_block(G8))
    r.hold(tuned, ["start", *(f"step {s}" for s in range(5, steps + 1, 5))])


@pytest.mark.parametrize(("batch", "lr", "reg"), [(4, 0.01, 0.01), (2, 0.05, 0.05)])
def test_adaround(batch: int, lr: float, reg: float) -> None:
    """Eq. 21 to 24: the rectified sigmoid, started at the weights' own fractions, and its regularizer, annealed after a fifth."""
    r, steps = Reference(), 80
    p, draw = r.given, norm_block().generator()

    def h(v: Tensor) -> Tensor:
        return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)

    floors, grids, choices = {}, {}, {}
    for n in "ud":
        low, high = ends(p[n])
        s = as_stored((high.clamp(min=0) - low.clamp(max=0)) / TOP)
        floors[n], grids[n] = (groups(p[n]) / s).floor(), (s, (-low.clamp(max=0) / s).round())
        fraction = (groups(p[n]) / s - floors[n]).clamp(1e-4, 1 - 1e-4)
        choices[n] = (-(1.2 / (fraction + 0.1) - 1).log()).requires_grad_()

    def changed(soft: bool) -> Parts:
        out = dict(p)
        for n, (s, z) in grids.items():
            up = h(choices[n]) if soft else (h(choices[n]) >= 0.5).double()
            out[n] = (((floors[n] + up + z).clamp(0, TOP) - z) * s).view(p[n].shape)
        return out

    optimizer = torch.optim.Adam(choices.values(), lr=lr)
    r.offer(changed(soft=False))
    for step in range(steps):
        picked = torch.randperm(4, generator=draw)[:batch]
        optimizer.zero_grad()
        loss = 16 * r.loss(changed(soft=True), picked)  # squares summed over the 16 channels of the output
        if step >= steps / 5:
            beta = 20 - 18 * (step - steps / 5) / (4 / 5 * steps)
            loss = loss + reg * sum((1 - (2 * h(v) - 1).abs().pow(beta)).sum() for v in choices.values())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 10 == 9:
            r.offer(changed(soft=False))
    tuned = LearnedRounding(rule="adaround", iters=steps, batch_size=batch, lr=lr, reg=reg, checks=8).tune(norm_block(G8))
    r.hold(tuned, ["start", *(f"step {s}" for s in range(10, steps + 1, 10))])


def test_qllms_correction() -> None:
    """Q(W + α / r · B A) and norms, AdamW with a linear schedule."""
    r, epochs, rank, alpha = Reference(), 6, 2, 3.0
    p, draw = r.given, norm_block().generator()
    pairs, norms = {}, {n: p[n].clone().requires_grad_() for n in "gh"}
    for n in "ud":
        a = (2 * torch.rand(rank, p[n].shape[1], generator=draw, dtype=torch.float64) - 1) / p[n].shape[1] ** 0.5
        pairs[n] = (a.requires_grad_(), torch.zeros(p[n].shape[0], rank, dtype=torch.float64, requires_grad=True))

    def changed() -> Parts:
        out = {**p, **norms}
        for n, (a, b) in pairs.items():
            w = p[n] + alpha / rank * b @ a
            out[n] = rounded(w, *ends(w))
        return out

    optimizer = torch.optim.AdamW([*(t for pair in pairs.values() for t in pair), *norms.values()], lr=0.02, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4 * epochs)
    r.descend(changed, optimizer, epochs, schedule.step)
    tuned = QllmCorrection(epochs=epochs, lr=0.02, rank=rank, alpha=alpha).tune(norm_block(G8))
    r.hold(tuned, ["start", *(f"epoch {e + 1}" for e in range(epochs))])


def test_the_reference_block_is_the_one_that_is_tuned() -> None:
    r = Reference()
    torch.testing.assert_close(r.block(r.given, r.inputs), r.targets, rtol=1e-12, atol=1e-12)
    assert set(r.given) == set(NAMES.values())
    assert float((r.inputs - random(4, 6, 16, seed=8)).abs().max()) == 0
