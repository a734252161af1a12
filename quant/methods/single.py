"""A single linear as a tuner's block: y = x Wᵀ, for `quantize_linear`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.methods.base import ANY, Linear
from quant.methods.tuner import TunableLinear, TuningBlocks
from quant.scheme import WeightScheme
from quant.statistics import Statistics


def single_linear(
    weight: Tensor, inputs: Tensor, scheme: WeightScheme, about: Linear = ANY, statistics: Statistics | None = None
) -> TuningBlocks:
    """weight `[N, K]`, inputs `[S, T, K]` of any float type; both streams are the same inputs."""
    w = weight.detach().to(torch.float64 if weight.dtype is torch.float64 else torch.float32)
    x = inputs.detach().to(w)
    key = f"{about.name}.weight"

    def forward(changed: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return hidden @ changed.get(key, w).to(hidden).T

    linear = TunableLinear(w, scheme, about.bias, about, statistics or Statistics())
    return TuningBlocks(about.name, {about.name: linear}, x, x, x @ w.T, forward, seed=about.seed)
