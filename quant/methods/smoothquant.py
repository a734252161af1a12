"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): moves activation outliers into the weights.

Objective: s_j = max|x_j|^α / max|w_j|^(1-α), clamped at 1e-5; columns of the weights are multiplied by s, the norm before
them divided, so that per-token activations quantize well. Shapes: absmax `[K]`, weights `[N, K]` with max over all rows of all
readers of the input, a router included.
Only inputs that come from a norm are smoothed, as in the reference code (attention output and down projections are not).
Default alpha 0.5; published runs tune it per model (0.6 to 0.9). Departures: an input that no norm feeds, or a norm whose readers are
partly left alone, stays unscaled with a note; an input's scale may be kept with the stored weight (`quantize_linear`) where the reference
folds it into the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.errors import require_finite
from quant.methods.base import ScaleGroup
from quant.parameters import Checked
from quant.scheme import ANY_NUMBER, Supports, WeightScheme
from quant.statistics import Statistics

FLOOR = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Checked):
    name: ClassVar[str] = "smoothquant"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    for_activations: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports(bits=tuple(range(1, 9)), ragged_groups=True, numbers=ANY_NUMBER)

    alpha: float = 0.5
    """Share of the outliers' size that moves into the weights: 0 none, 1 all."""

    def scale(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """s `[K]` float32, or None where the input does not come from a norm."""
        if group.producer_kind != "norm":
            return None
        group.statistics.require("smoothquant", "absmax")
        assert group.statistics.absmax is not None
        peak = group.statistics.absmax.float()
        require_finite("activation absmax", peak)
        readers = {**group.consumers, **group.routers}
        for name, weight in readers.items():
            require_finite(f"weight {name}", weight)
        widest = torch.stack([w.detach().float().abs().amax(0) for w in readers.values()]).amax(0).clamp(min=FLOOR)
        return (peak.pow(self.alpha) / widest.pow(1 - self.alpha)).clamp(min=FLOOR)

    def rewrite(self, name: str, weight: Tensor, statistics: Statistics, scheme: WeightScheme) -> Tensor | None:
        """Nothing beyond scaling."""
        return None
