"""Gradients of learned ranges, corrections and norms against central differences; the others' are in test_tuners.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant.affine import grouped
from quant.methods.learned_rounding import LearnedRounding, _Offsets
from quant.methods.qllm_correction import QllmCorrection, _Corrected
from quant.methods.tuner import TunableLinear, sequence_loss
from quant.scheme import Granularity, WeightScheme
from tests.quant.test_tuners import norm_block, random

ROW = WeightScheme(3, scale_dtype="float32")
G8 = WeightScheme(3, granularity=Granularity.GROUP, group_size=8, scale_dtype="float32")
STEP = 1e-6


class Frozen:
    """A quantizer of codes from the least to the greatest value, written out, whose roundings (of codes, zero and scale) stay the
    residues that they were at the start: what gradients that pass roundings unchanged are the slopes of."""

    def __init__(self, w: Tensor, low: Tensor, high: Tensor, scheme: WeightScheme) -> None:
        """w `[R, G, g]`, low and high `[R, G, 1]` of both signs."""
        self.top = 2**scheme.bits - 1
        exact = (high - low) / self.top
        scale = exact.float().double()
        self.cast = scale - exact
        zero = (-low / scale).round()
        self.zero_residue, self.code_residue = zero + low / scale, (w / scale).round() - w / scale
        codes = (w / scale).round() + zero
        self.inside, self.ends = (codes >= 0) & (codes <= self.top), codes.clamp(0, self.top)
        assert bool(((zero >= 0) & (zero <= self.top)).all())

    def values(self, w: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale = (high - low) / self.top + self.cast
        zero = -low / scale + self.zero_residue
        return (torch.where(self.inside, w / scale + self.code_residue + zero, self.ends) - zero) * scale


def hold_to_slopes(loss: Callable[[], Tensor], parameters: list[Tensor], reference: Callable[[], Tensor]) -> None:
    """Gradients of `loss` are the slopes of `reference`, which has its value."""
    for p in parameters:
        p.grad = None
    start = loss()
    assert float(start.detach()) == pytest.approx(float(reference()), rel=1e-12)
    start.backward()  # type: ignore[no-untyped-call]
    for p in parameters:
        assert p.grad is not None
        assert p.grad.any()
        for i in range(0, p.numel(), max(1, p.numel() // 8)):
            ends = []
            with torch.no_grad():
                flat = p.view(-1)
                before = float(flat[i])
                for sign in (1, -1):
                    flat[i] = before + sign * STEP
                    ends.append(float(reference()))
                flat[i] = before
            assert float(p.grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("scheme", [ROW, G8])
def test_autorounds_range_factors(scheme: WeightScheme) -> None:
    w, target = random(5, 16, seed=1), random(5, 16, seed=2)
    offsets = _Offsets("w", TunableLinear(w, scheme), LearnedRounding())
    _, low, high = offsets.parameters()
    with torch.no_grad():
        for p, seed in ((low, 3), (high, 4)):
            p.copy_(0.7 + 0.3 * torch.sigmoid(random(*p.shape, seed=seed)))
    g = grouped(w, scheme)

    def limits() -> tuple[Tensor, Tensor]:
        return g.amin(-1, keepdim=True) * low, g.amax(-1, keepdim=True) * high

    with torch.no_grad():
        frozen = Frozen(g, *limits(), scheme)

    def reference() -> Tensor:
        with torch.no_grad():
            return (frozen.values(g, *limits()).view(w.shape) - target).square().sum()

    hold_to_slopes(lambda: (offsets.soft() - target).square().sum(), [low, high], reference)


def test_qllms_correction() -> None:
    """A and B inside the quantizer, whose range they move."""
    w, target = random(5, 16, seed=1), random(5, 16, seed=2)
    part = _Corrected("w", TunableLinear(w, ROW), QllmCorrection(rank=2, alpha=3.0), torch.Generator().manual_seed(0))
    with torch.no_grad():
        part.b.copy_(random(5, 2, seed=3))

    def corrected() -> Tensor:
        return grouped(w + 1.5 * part.b @ part.a, ROW)

    with torch.no_grad():
        g = corrected()
        frozen = Frozen(g, g.amin(-1, keepdim=True), g.amax(-1, keepdim=True), ROW)

    def reference() -> Tensor:
        with torch.no_grad():
            g = corrected()
            return (frozen.values(g, g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)).view(w.shape) - target).square().sum()

    hold_to_slopes(lambda: (part.soft() - target).square().sum(), [part.a, part.b], reference)


def test_qllms_norms() -> None:
    """Weights are quantized, not inputs: the block is smooth in its norm."""
    blocks = norm_block(ROW)
    part = _Corrected("up", blocks.linears["up"], QllmCorrection(), torch.Generator().manual_seed(0))
    norms = {n: p.detach().clone().requires_grad_() for n, p in blocks.norms.items()}

    def loss() -> Tensor:
        return sequence_loss(blocks, {"up.weight": part.soft().detach(), **norms}, slice(0, 1))

    def reference() -> Tensor:
        with torch.no_grad():
            return loss()

    hold_to_slopes(loss, list(norms.values()), reference)
