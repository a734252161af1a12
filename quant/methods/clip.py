"""Weight clipping by search: the bounds of each group that leave the least error after rounding, before any rounding.

Objective, `clip`: min over (l, h) of Σ (Q(clamp(w, l, h)) - w)² per row and group; `clip_output`: of the output error on calibration
data, d H_gg dᵀ with d = Q(clamp(w, l, h)) - w and H_gg the group's block of the Hessian: the error of the group's own share of
the output, as in AWQ's clip search (arXiv 2306.00978), over all tokens instead of a part.
symmetric: l = -p max|w|, h = p max|w|; asymmetric: l = p min w, h = q max w, all pairs (p, q) (LLMC, arXiv 2405.06001, calls both
so). p, q = 1 - i / steps for i = 0 .. steps · max_shrink - 1: no clipping is among them, so the choice is never worse.
Shapes: weight `[N, K]`, Hessian `[K, K]`. A range without zero (all of a group positive) is clipped towards zero at its far end
only. AWQ has a clip search of its own, and OmniQuant learns its bounds. Integer numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import grouped
from quant.errors import require_finite
from quant.grids import choose_grid, fit, grid, with_stored_scales
from quant.methods.base import ScaleGroup
from quant.scheme import Granularity, Supports, WeightScheme
from quant.statistics import Statistics

KINDS = ("symmetric", "asymmetric")


@dataclass(frozen=True)
class Clip:
    name: ClassVar[str] = "clip"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    for_activations: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports()

    kind: str = "asymmetric"
    """symmetric: one bound for both signs; asymmetric: one each."""
    steps: int = 20
    """Bounds are tried in steps of 1 / steps of the range."""
    max_shrink: float = 0.5
    """Down to this share less of the range."""
    grid: str | None = None
    """Grid that the search rounds to; give it the rounding's. None is g_sym or g_asym as the scheme says."""

    def __post_init__(self) -> None:
        if self.grid is not None:
            grid(self.grid)
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind} is unknown; choose one of {', '.join(KINDS)}, or leave the transform out for none")
        if self.steps < 1 or not 0 < self.max_shrink <= 1:
            raise ValueError(f"steps={self.steps} must be at least 1 and max_shrink={self.max_shrink} in (0, 1]")

    def scale(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """No scaling."""
        return None

    def rewrite(self, name: str, weight: Tensor, statistics: Statistics, scheme: WeightScheme) -> Tensor | None:
        """The clipped weight `[N, K]` in float32 (float64 for float64). Raises NonFiniteError."""
        require_finite(f"weight {name}", weight)
        w = grouped(weight.detach().to(torch.float64 if weight.dtype is torch.float64 else torch.float32), scheme)
        return self._search(w, scheme, self._errors(w, statistics, scheme)).reshape(weight.shape)

    def _errors(self, w: Tensor, statistics: Statistics, scheme: WeightScheme) -> Callable[[Tensor], Tensor]:
        """Changes `[N, G, g]` ▸ what they cost, `[N, G, 1]`."""
        return lambda change: change.square().sum(-1, keepdim=True)

    def _search(self, w: Tensor, scheme: WeightScheme, errors: Callable[[Tensor], Tensor]) -> Tensor:
        chosen, _ = choose_grid(self.grid, scheme)
        best, least = w, torch.full_like(w[..., :1], float("inf"))
        for low, high in self._bounds(w):
            clipped = w.clamp(low, high)
            rounded, _ = with_stored_scales(scheme, lambda dtype, c=clipped: fit(chosen, c, scheme.bits, dtype).round(c))  # type: ignore[misc]
            error = errors(rounded - w)
            better = error < least
            best, least = torch.where(better, clipped, best), torch.where(better, error, least)
        return best

    def _bounds(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        shares = [1 - i / self.steps for i in range(max(1, int(self.steps * self.max_shrink)))]
        if self.kind == "symmetric":
            widest = torch.maximum(low.abs(), high.abs())
            yield from ((-p * widest, p * widest) for p in shares)
            return
        for p in shares:
            for q in shares:
                # The near end of a range without zero stays: moving it would only widen the range.
                yield torch.where(low < 0, p * low, low), torch.where(high > 0, torch.maximum(q * high, low), high)


@dataclass(frozen=True)
class ClipOutput(Clip):
    name: ClassVar[str] = "clip_output"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    supports: ClassVar[Supports] = Supports(granularity=("channel", "group"))

    def _errors(self, w: Tensor, statistics: Statistics, scheme: WeightScheme) -> Callable[[Tensor], Tensor]:
        statistics.require("clip_output", "hessian")
        assert statistics.hessian is not None
        require_finite("Hessian", statistics.hessian)
        assert scheme.granularity is not Granularity.TENSOR
        _, groups, g = w.shape
        index = torch.arange(groups * g, device=w.device).view(groups, g)
        blocks = statistics.hessian.to(w)[index[:, :, None], index[:, None, :]]  # [G, g, g]

        def errors(change: Tensor) -> Tensor:
            d = change.transpose(0, 1)  # [G, N, g]
            return ((d @ blocks) * d).sum(-1).T[..., None]

        return errors
