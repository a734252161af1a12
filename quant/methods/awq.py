"""AWQ (Lin et al. 2023, arXiv 2306.00978): scales up the input channels that matter, then clips.

Objective, scale search: min over r of mean (module(x; W) - module(x; Q(W s) / s))², s = mean|x|^r, r = 0, 1/20 .. 19/20;
the start r = 0 is s = 1, so the choice is never worse than no scaling (duo_scaling divides by a power of mean |w|: no such start).
Clip search: per row and group, the symmetric bound M of least mean (⟨x_g, Q(clamp(w, ±M))⟩ - ⟨x_g, w⟩)²; M = max|w| is a candidate.
Shapes: weights `[N, K]`, samples `[S, T, K]`, absmean `[K]`. Query and key projections are not clipped, as in the reference.
Departures: samples are those that calibrate keeps (16 sequences, 8,192 tokens at most); one group per row works in the clip search;
fewer than `clip_tokens` tokens are all used.
Three shortcuts leave the result as it is: where the module is the linear itself the loss is tr(D XᵀX Dᵀ), D the change of
the weight (exact in real arithmetic); a candidate is given up as soon as its sum of squares reaches the least one; more
than g tokens enter the clip error through the triangular factor of their QR decomposition (exact in real arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import grouped
from quant.errors import require_finite
from quant.grids import choose_grid, round_groups, round_weight
from quant.methods.base import ScaleGroup
from quant.parameters import Checked, refuses_scheme
from quant.scheme import Supports, WeightScheme
from quant.statistics import Statistics

LOSS_TOKENS = 1024
"""Tokens between two looks at whether a candidate can still win; whole sequences, at least one."""
CLIP_VALUES = 2**24
"""Values of one intermediate of the clip search."""


@dataclass(frozen=True)
class Awq(Checked):
    name: ClassVar[str] = "awq"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"absmean", "samples"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    for_activations: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=tuple(range(1, 9)))

    scale_grid: int = 20
    """Exponents tried: i / scale_grid for i = 0 .. scale_grid - 1."""
    duo_scaling: bool = False
    """Also divide by the weights' mean relative magnitude (AutoAWQ)."""
    clip_search: bool = True
    clip_grid: int = 20
    """Bounds are max|w| (1 - i / clip_grid) for i = 0 .. clip_grid · max_shrink - 1."""
    max_shrink: float = 0.5
    clip_tokens: int = 512
    """Tokens of the clip error, taken at equal distances."""
    grid: str | None = "awq_asym"
    """Grid that the searches round to; symmetric schemes use g_sym."""

    def scale(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """s `[K]` float32 of the smallest loss, the first of equals."""
        group.statistics.require("awq", "absmean", "samples")
        assert group.statistics.absmean is not None
        consumers = {name: w.detach().float() for name, w in group.consumers.items()}
        for name, w in consumers.items():
            require_finite(f"weight {name}", w)
        salience = group.statistics.absmean.float()
        require_finite("activation absmean", salience)
        require_finite("activation samples", _samples(group))
        schemes = {name: group.schemes.get(name, scheme) for name in consumers}
        grids = {name: choose_grid(self.grid, own)[0] for name, own in schemes.items()}
        magnitude = _relative_magnitude(consumers, schemes) if self.duo_scaling else None

        partial_losses = (_linear_losses if group.linear else _module_losses)(group, consumers, self.scale_grid)
        best, least = torch.ones_like(salience), float("inf")
        for i in range(self.scale_grid):
            s = candidate_scale(salience, i / self.scale_grid, magnitude)
            rounded = {name: round_weight(grids[name], w * s, schemes[name]) / s for name, w in consumers.items()}
            loss = 0.0
            for part in partial_losses(rounded):
                loss += part
                if loss >= least:
                    break
            if loss < least:
                best, least = s, loss
        if least == float("inf"):
            raise ValueError(f"group {group.name}: the module's output is not finite on any candidate scale; check model and data type")
        return best

    def rewrite(self, name: str, weight: Tensor, statistics: Statistics, scheme: WeightScheme) -> Tensor | None:
        """The clipped weight `[N, K]` float32, or None without clip search and for query and key projections."""
        if not self.clip_search or _feeds_scores(name):
            return None
        statistics.require("awq", "samples")
        assert statistics.samples is not None
        return self.clip(weight, statistics.samples, scheme)

    def clip(self, weight: Tensor, samples: Tensor, scheme: WeightScheme) -> Tensor:
        """Clamps each row and group at the bound of least output error. Samples are `[.., K]`."""
        reason = refuses_scheme(self.name, {}, scheme)
        if reason is not None:
            raise ValueError(reason)
        tokens = samples.reshape(-1, samples.shape[-1])
        tokens = tokens[:: max(1, tokens.shape[0] // self.clip_tokens)].float()
        w = grouped(weight.detach().float(), scheme)
        n, groups, g = w.shape
        x = tokens.view(-1, groups, g).transpose(0, 1)  # [G, tokens, g]
        if x.shape[1] > g:
            x = torch.linalg.qr(x, mode="r").R
        rows = max(1, CLIP_VALUES // (groups * max(x.shape[1], g)))
        return torch.cat([self._clip_rows(part, x, scheme) for part in torch.split(w, rows)]).view(n, groups * g)

    def _clip_rows(self, w: Tensor, x: Tensor, scheme: WeightScheme) -> Tensor:
        """w `[rows, G, g]`, x `[G, tokens, g]`."""
        chosen, _ = choose_grid(self.grid, scheme)
        widest = w.abs().amax(-1, keepdim=True)
        best, least = widest, torch.full_like(widest, float("inf"))
        for i in range(max(1, int(self.clip_grid * self.max_shrink))):
            bound = widest * (1 - i / self.clip_grid)
            clipped = w.clamp(-bound, bound)
            difference = (round_groups(chosen, clipped, scheme) - w).permute(1, 2, 0)  # [G, g, rows]
            error = torch.bmm(x, difference).square().sum(1).T[..., None]
            better = error < least
            best, least = torch.where(better, bound, best), torch.where(better, error, least)
        return w.clamp(-best, best)


def candidate_scale(salience: Tensor, ratio: float, magnitude: Tensor | None = None) -> Tensor:
    """s `[K]` for an exponent: salience^r, at least 1e-4, with its extremes centred on 1."""
    s = salience.pow(ratio)
    if magnitude is not None:
        s = s / (magnitude.pow(1 - ratio) + 1e-4)
    s = s.clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def _relative_magnitude(weights: Mapping[str, Tensor], schemes: Mapping[str, WeightScheme]) -> Tensor:
    """`[K]`: mean over all rows of |w| / max|w| in its group."""
    relative = []
    for scheme in dict.fromkeys(schemes.values()):
        stacked = torch.cat([w for name, w in weights.items() if schemes[name] == scheme])
        groups = grouped(stacked, scheme).abs()
        relative.append((groups / (groups.amax(-1, keepdim=True) + 1e-6)).view(stacked.shape))
    return torch.cat(relative).mean(0)


PartialLosses = Callable[[Mapping[str, Tensor]], Iterator[float]]
"""Weights of the consumers ▸ sums of the squared change of the module's output, part by part of the samples, never negative."""


def _module_losses(group: ScaleGroup, weights: Mapping[str, Tensor], trials: int) -> PartialLosses:
    """Through the module; the same parts in every trial, so that the sums compare."""
    samples = _samples(group)
    batches = torch.split(samples, max(1, LOSS_TOKENS // samples.shape[1]))
    targets = [group.forward(weights, x) for x in batches]

    def losses(changed: Mapping[str, Tensor]) -> Iterator[float]:
        for x, y in zip(batches, targets, strict=True):
            yield float((group.forward(changed, x) - y).float().square().sum(dtype=torch.float64))

    return losses


def _linear_losses(group: ScaleGroup, weights: Mapping[str, Tensor], trials: int) -> PartialLosses:
    """||X Dᵀ||² = tr(D XᵀX Dᵀ): XᵀX once instead of all tokens in every trial, where that is less work."""
    ((name, weight),) = weights.items()
    x = _samples(group).flatten(0, 1).float()
    (tokens, k), n = x.shape, weight.shape[0]
    gram = x.T @ x if tokens * k + trials * n * k < trials * n * tokens else None

    def losses(changed: Mapping[str, Tensor]) -> Iterator[float]:
        difference = changed[name] - weight
        if gram is None:
            yield float((x @ difference.T).square().sum(dtype=torch.float64))
        else:
            # Rounding can leave a tiny negative sum where nothing changed.
            yield max(0.0, float(((difference @ gram) * difference).sum(dtype=torch.float64)))

    return losses


def _samples(group: ScaleGroup) -> Tensor:
    samples = group.statistics.samples
    assert samples is not None
    if samples.dim() != 3 or not samples.numel():
        raise ValueError(f"group {group.name}: awq needs samples [S, T, K]; got shape {tuple(samples.shape)}")
    return samples


def _feeds_scores(name: str) -> bool:
    """Whether the linear makes queries or keys, alone or fused: clipping them hurts the attention scores."""
    return any(p.startswith(("q_", "k_")) or "query" in p or "key" in p or "qkv" in p.lower() or p == "c_attn" for p in name.split("."))
