"""A single linear as a tuner's block: y = x Wᵀ, for `quantize_linear`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quant.methods.base import ANY, Linear, working_dtype
from quant.methods.tuner import TunableLinear, TuningBlocks
from quant.scheme import ActivationScheme, WeightScheme
from quant.statistics import Statistics
from quant.straight_through import activation_through


def single_linear(
    weight: Tensor,
    inputs: Tensor,
    scheme: WeightScheme,
    about: Linear = ANY,
    statistics: Statistics | None = None,
    activation: ActivationScheme | None = None,
) -> TuningBlocks:
    """weight `[N, K]`, inputs `[S, T, K]` of any float type; both streams are the same inputs, fake-quantized where there is an
    activation scheme (dynamic ranges)."""
    w = weight.detach().to(working_dtype(weight))
    x = inputs.detach().to(w)
    key = f"{about.name}.weight"

    def forward(changed: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        hidden = hidden if activation is None else activation_through(hidden, activation)
        return hidden @ changed.get(key, w).to(hidden).T

    linear = TunableLinear(w, scheme, about.bias, about, statistics or Statistics())
    return TuningBlocks(about.name, {about.name: linear}, x, x, x @ w.T, forward, activation=activation, seed=about.seed)
