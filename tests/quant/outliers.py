"""A linear whose input has a few channels far from the others: what W8A8 loses, and how much of it a method wins back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.activation import fake_quantize_activation
from quant.methods.base import ScaleGroup
from quant.scheme import ActivationScheme, WeightScheme
from quant.statistics import collect

PLANTED = [3, 17, 40]
W8, A8 = WeightScheme(8, True, scale_dtype="float32"), ActivationScheme(8)


def layer(offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weight `[48, 64]` and inputs `[4, 60, 64]`, of which three channels are 60 times wider, or `offset` away from 0."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(48, 64, generator=g) / 8, torch.randn(4, 60, 64, generator=g)
    if offset:
        x[..., PLANTED] += offset
    else:
        x[..., PLANTED] *= 60
    return w, x


def group(w: Tensor, x: Tensor, activation: ActivationScheme | None = A8) -> ScaleGroup:
    def forward(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return inputs @ weights["weight"].T

    statistics = collect(x, frozenset({"absmax", "minmax", "samples"}))
    return ScaleGroup("linear", "norm", {"weight": w}, statistics, forward, linear=True, activation=activation)


def loss(w: Tensor, x: Tensor, rounded: Tensor, activation: ActivationScheme, s: Tensor | None = None, z: Tensor | None = None) -> float:
    """Squared error of (Q((x - z) / s)) (rounded)ᵀ + W z, rounded being Q(W s); static ranges are those of (x - z) / s."""
    z = torch.zeros(x.shape[-1]) if z is None else z
    s = torch.ones(x.shape[-1]) if s is None else s
    inputs = (x - z) / s
    limits = None if activation.dynamic else (float(inputs.min()), float(inputs.max()))
    got = fake_quantize_activation(inputs, activation, limits) @ rounded.T + w @ z
    return float((got - x @ w.T).square().sum())
