"""OS+ (Outlier Suppression+, Wei et al. 2023, arXiv 2304.09145): channel-wise shifting and scaling of activations.

Shift: z_j = (max x_j + min x_j) / 2 makes every channel of the input symmetric about 0: x ▸ x - z, the norm's bias loses z, every
reader's bias gains W z. Scale: s_j = max(1, max|x_j - z_j| / t): only channels above the threshold t shrink; W's columns grow.
Objective: min over t of mean (module(Q(x / s); Q(W s)) - module(x; W))², activations and weights rounded as the scheme says;
t = (1 - i / steps) · the largest channel, i = 0 .. steps - 1, the first being no scaling: never worse than none.
Shapes: minmax `[2, K]`, samples `[S, T, K]`, weights `[N, K]`. Only inputs that come from a norm are changed, as in the reference.
Departures: rules that need a bias which the model does not have (RMSNorm, linears without bias) are not shifted, and the stage
says so; static activation ranges are, in the search, those of the channel limits.
Without activation quantization it runs, idle. A Hessian cannot be carried through a shift: use shifting=false before gptq.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.activation import fake_quantize_activation
from quant.errors import require_finite
from quant.grids import choose_grid, round_weight
from quant.methods.base import ScaleGroup
from quant.parameters import Checked
from quant.scheme import ActivationScheme, Supports, WeightScheme
from quant.statistics import Statistics

FLOOR = 1e-5


@dataclass(frozen=True)
class OsPlus(Checked):
    name: ClassVar[str] = "os_plus"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"minmax", "samples"})
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = False
    for_activations: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports()

    shifting: bool = True
    """Shift where norm and readers have biases."""
    steps: int = 50
    """Thresholds tried."""
    grid: str | None = "absmax"
    """Grid of the weights in the search; give it the rounding's."""

    def shift(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """z `[K]` float32, or None without shifting, for inputs that come from no norm, and without activation quantization."""
        if not self.shifting or group.producer_kind != "norm" or group.activation is None:
            return None
        low, high = _limits(group)
        return (low + high) / 2

    def scale(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """s `[K]` ≥ 1 float32 of the smallest loss, the largest threshold of equals; None as for `shift`."""
        if group.producer_kind != "norm" or group.activation is None:
            return None
        low, high = _limits(group)
        group.statistics.require("os_plus", "samples")
        x = group.statistics.samples
        assert x is not None
        require_finite("activation samples", x)
        for name, w in group.consumers.items():
            require_finite(f"weight {name}", w)
        peak = torch.maximum(low.abs(), high.abs()).clamp(min=FLOOR)
        target = group.forward(group.consumers, x).float()
        best, least = torch.ones_like(peak), float("inf")
        for i in range(self.steps):
            s = (peak / (peak.max() * (1 - i / self.steps))).clamp(min=1)
            loss = self._loss(group, scheme, group.activation, x, target, s, (low / s, high / s))
            if loss < least:
                best, least = s, loss
        if least == float("inf"):
            raise ValueError(f"group {group.name}: the module's output is not finite for any threshold; check model and data type")
        return best

    def _loss(
        self,
        group: ScaleGroup,
        scheme: WeightScheme,
        activation: ActivationScheme,
        x: Tensor,
        target: Tensor,
        s: Tensor,
        limits: tuple[Tensor, Tensor],
    ) -> float:
        # (Q(x/s) s) (Q(W s)/s)ᵀ: a router that reads the input too then needs no scaling.
        weights = {n: (self._rounded(w.float() * s, group.schemes.get(n, scheme)) / s).to(w) for n, w in group.consumers.items()}
        fixed = None if activation.dynamic else (float(limits[0].min()), float(limits[1].max()))
        inputs = (fake_quantize_activation(x.float() / s, activation, fixed) * s).to(x.dtype)
        return float((group.forward(weights, inputs).float() - target).square().sum(dtype=torch.float64))

    def _rounded(self, weight: Tensor, scheme: WeightScheme) -> Tensor:
        return round_weight(choose_grid(self.grid, scheme)[0], weight, scheme)

    def rewrite(self, name: str, weight: Tensor, statistics: Statistics, scheme: WeightScheme) -> Tensor | None:
        """Nothing beyond shifting and scaling."""
        return None


def _limits(group: ScaleGroup) -> tuple[Tensor, Tensor]:
    group.statistics.require("os_plus", "minmax")
    found = group.statistics.minmax
    assert found is not None
    require_finite("activation minmax", found)
    low, high = found.float()
    return low, high
