"""Weight clipping as an axis: the bounds of each group that leave the least error after rounding, before any rounding.

Objective, `clip`: min over (l, h) of Σ (Q(clamp(w, l, h)) - w)² per row and group; `clip_output`: of the output error on calibration
data, d H_gg dᵀ with d = Q(clamp(w, l, h)) - w and H_gg the group's block of the Hessian: the error of the group's own share of
the output, as in AWQ's clip search (arXiv 2306.00978), over all tokens instead of a part. Per channel its sum is tr(E H Eᵀ).

kind        bounds
none        none: the weight stays as it is, and planning leaves the transform out
symmetric   l = -p max|w|, h = p max|w|; p = 1 - i / steps for i = 0 .. steps · max_shrink - 1
asymmetric  l = p min w, h = q max w, all pairs (p, q) of these (LLMC, arXiv 2405.06001, calls both so)
learned     the same with p = σ(a), q = σ(b) (OmniQuant's learned clipping, arXiv 2308.13137, eq. 2); a and b by Adam, with gradients
            straight through the rounding, from the asymmetric pair on (at most σ(4), OmniQuant's start); least error of all iterates
            and that pair, in each group

No clipping is among the pairs and the asymmetric pair among the iterates: learned ≤ asymmetric ≤ none for every row and group, as
symmetric ≤ none.
Shapes: weight `[N, K]`, Hessian `[K, K]`. A range without zero (all of a group positive) is clipped towards zero at its far end
only. AWQ has a clip search of its own; OmniQuant learns its bounds against the output of a block, and rounds by them. Integer numbers
only. Departure from eq. 2: rounding takes its range from the clipped weight, which is what the rounding that follows is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.adam import Adam
from quant.affine import Affine, grouped
from quant.errors import require_finite
from quant.grids import choose_grid, fit, round_groups, unfit_float16, with_stored_scales
from quant.methods.base import ScaleGroup, working_dtype
from quant.methods.clipping import START
from quant.parameters import Checked
from quant.scheme import Granularity, Supports, WeightScheme
from quant.statistics import Statistics
from quant.straight_through import affine_through, round_through

LEARNED_VALUES = 2**22
"""Weights that are learned at once: a graph holds a dozen tensors of their shape."""

Errors = Callable[[Tensor], Tensor]
"""Changes `[n, G, g]` of rows ▸ what they cost, `[n, G, 1]`."""


@dataclass(frozen=True)
class Clip(Checked):
    name: ClassVar[str] = "clip"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    for_activations: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports()

    kind: str = "asymmetric"
    """none; symmetric: one bound for both signs; asymmetric: one each; learned: these moved on by gradients."""
    steps: int = 20
    """Bounds are tried in steps of 1 / steps of the range."""
    max_shrink: float = 0.5
    """Down to this share less of the range."""
    grid: str | None = None
    """Grid that the search rounds to; give it the rounding's. None is g_sym or g_asym as the scheme says."""
    iters: int = 50
    """Steps of Adam; learned alone reads it, and `lr`."""
    lr: float = 0.02
    """Of Adam, for a and b."""

    def scale(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """No scaling."""
        return None

    def rewrite(self, name: str, weight: Tensor, statistics: Statistics, scheme: WeightScheme) -> Tensor | None:
        """The clipped weight `[N, K]` in float32 (float64 for float64); None for no clipping. Raises NonFiniteError."""
        if self.kind == "none":
            return None
        require_finite(f"weight {name}", weight)
        w = grouped(weight.detach().to(working_dtype(weight)), scheme)
        errors = self._errors(w, statistics, scheme)
        best, shares = self._search(w, scheme, errors)
        if self.kind == "learned":
            best = self._learn(w, best, shares, scheme, errors)
        return best.reshape(weight.shape)

    def _errors(self, w: Tensor, statistics: Statistics, scheme: WeightScheme) -> Errors:
        return lambda change: change.square().sum(-1, keepdim=True)

    def _search(self, w: Tensor, scheme: WeightScheme, errors: Errors) -> tuple[Tensor, Tensor]:
        """The weight in the best bounds `[N, G, g]`, and their shares of the range `[2, N, G, 1]`."""
        chosen, _ = choose_grid(self.grid, scheme)
        ends = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        best, least = w, torch.full_like(w[..., :1], float("inf"))
        taken = [torch.ones_like(least), torch.ones_like(least)]
        shares = [1 - i / self.steps for i in range(max(1, int(self.steps * self.max_shrink)))]
        for p, q in [(p, p) for p in shares] if self.kind == "symmetric" else [(p, q) for p in shares for q in shares]:
            clipped = w.clamp(*self._bounds(*ends, p, q))
            error = errors(round_groups(chosen, clipped, scheme) - w)
            better = error < least
            best, least = torch.where(better, clipped, best), torch.where(better, error, least)
            taken = [torch.where(better, share, old) for share, old in zip((p, q), taken, strict=True)]
        return best, torch.stack(taken)

    def _bounds(self, low: Tensor, high: Tensor, p: Tensor | float, q: Tensor | float) -> tuple[Tensor, Tensor]:
        if self.kind == "symmetric":
            widest = torch.maximum(low.abs(), high.abs())
            return -p * widest, p * widest
        # The near end of a range without zero stays: moving it would only widen the range.
        return torch.where(low < 0, p * low, low), torch.where(high > 0, torch.maximum(q * high, low), high)

    def soft(self, w: Tensor, logits: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> tuple[Tensor, Affine, Tensor]:
        """Groups `[n, G, g]` in the bounds of `logits` `[2, n, G, 1]`, how they are rounded, and what they become, bit for bit, with
        gradients for the logits."""
        chosen, _ = choose_grid(self.grid, scheme)
        clipped = w.clamp(*self._bounds(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), *torch.sigmoid(logits)))
        affine = affine_through(chosen, *chosen.limits(clipped), scheme.bits, scale_dtype)
        return clipped, affine, round_through(affine, clipped)

    def _learn(self, w: Tensor, found: Tensor, shares: Tensor, scheme: WeightScheme, errors: Errors) -> Tensor:
        """`found` `[N, G, g]`, with better bounds in the groups that have any."""
        chosen, _ = choose_grid(self.grid, scheme)

        def rounded_to(dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
            return fit(chosen, found, scheme.bits, dtype).round(found), dtype

        (rounded, dtype), _ = with_stored_scales(scheme, rounded_to)
        least = errors(rounded - w)
        rows = max(1, LEARNED_VALUES // w[0].numel())
        parts = [slice(i, i + rows) for i in range(0, len(w), rows)]
        return torch.cat([self._descend(w[p], found[p], least[p], shares[:, p], scheme, dtype, errors) for p in parts])

    def _descend(
        self, w: Tensor, best: Tensor, least: Tensor, shares: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, errors: Errors
    ) -> Tensor:
        """Of rows, which share nothing: each group's error counts in units of its first, so that Adam's epsilon is as small for all."""
        unit = torch.where(least > torch.finfo(least.dtype).tiny, 1 / least, 0.0)
        logits = torch.logit(shares.clamp(max=1 / (1 + math.exp(-START)))).requires_grad_()
        adam = Adam([([logits], self.lr)])
        for _ in range(self.iters):
            with torch.enable_grad():
                clipped, affine, rounded = self.soft(w, logits, scheme, scale_dtype)
                error = errors(rounded - w)
                adam.zero_grad()
                (error * unit).sum().backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                better = error < least
                if scale_dtype is torch.float16:
                    better &= ~unfit_float16(affine, clipped)  # one that does not fit would widen the scales of all
                best, least = torch.where(better, clipped, best), torch.where(better, error, least)
        return best


@dataclass(frozen=True)
class ClipOutput(Clip):
    name: ClassVar[str] = "clip_output"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    supports: ClassVar[Supports] = Supports(granularity=("channel", "group"))

    def _errors(self, w: Tensor, statistics: Statistics, scheme: WeightScheme) -> Errors:
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
