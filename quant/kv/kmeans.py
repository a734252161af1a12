"""One-dimensional weighted k-means: the start of scikit-learn's KMeans (greedy k-means++ on the seed's own random numbers), then
Lloyd's steps on sorted values, where a step costs k binary searches.

The start decides which local optimum is found, so a codebook that equals the reference's needs the reference's random stream, and
its rounding: centred values, and distances and sums of weighted values in float32. `quant.kernels.kmeans_columns`, which works in float64,
would draw other centres.
"""

from __future__ import annotations

import random
from itertools import accumulate

import torch
from torch import Tensor

from quant.kernels.kmeans_columns import numpy_stream, trials

STEPS = 50
ROUNDED = 2**17
"""Values up to which the start repeats the reference's rounding."""
TOLERANCE = 1e-4
"""Of the variance of the values: Lloyd stops when the centres together moved less (squared)."""


def kmeans(values: Tensor, k: int, weights: Tensor | None = None, seed: int = 0, steps: int = STEPS) -> Tensor:
    """values `[n]` (with weights `[n]` >= 0) ▸ at most k centres, ascending, float64. Raises ValueError without values.

    Fewer centres come back where there are fewer distinct values."""
    given = values.flatten()
    exact = torch.float64 if given.dtype is torch.float64 else torch.float32
    given = given.to(exact)
    w = torch.ones_like(given) if weights is None else weights.flatten()
    w = w.to(exact).double()
    if not given.numel() or not float(w.sum()) > 0:
        raise ValueError(f"k-means got {given.numel()} values of total weight {float(w.sum())}; it needs some")
    mean = given.double().mean().to(exact)
    v = (given - mean).double()
    return _lloyd(v, w, _start(v, w, k, exact, numpy_stream(seed)), steps) + mean.double()


def _start(v: Tensor, w: Tensor, k: int, exact: torch.dtype, stream: random.Random) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): of a few draws in proportion to weight x squared distance, the best.

    Values lie in no order, so a draw that is off by one picks another centre: distances are rounded as in the reference."""

    def distances(c: int) -> Tensor:
        return (v - v[c]).square().to(exact).double()

    count = trials(k)
    shares = (w.to(exact) / w.sum().to(exact)).double().cumsum(0)
    first = int(torch.searchsorted(shares / shares[-1], stream.random(), right=True))
    chosen = [min(first, len(v) - 1)]
    near = distances(chosen[0])
    for _ in range(1, k):
        mass = _sums((w * near).to(exact))
        draws = torch.tensor([stream.random() for _ in range(count)], dtype=v.dtype, device=v.device) * (w * near).sum().to(exact).double()
        candidates = torch.searchsorted(mass, draws).clamp(max=len(v) - 1).tolist()
        trial = [torch.minimum(near, distances(c)) for c in candidates]
        best = min(range(count), key=lambda i: float((trial[i] * w).sum()))
        chosen.append(candidates[best])
        near = trial[best]
    centres = v[chosen].sort().values
    return centres[torch.cat([torch.ones_like(centres[:1], dtype=torch.bool), centres[1:] > centres[:-1]])]


def _sums(x: Tensor) -> Tensor:
    """Cumulative sums, float64. Those of few enough float32 values carry float32's rounding of each addition, as the reference's do:
    it moves one draw in ten to a neighbour."""
    if x.dtype is torch.float64 or len(x) > ROUNDED:
        return x.double().cumsum(0)

    def add(a: float, b: float) -> float:
        a += b
        c = a * 536870913.0  # 2^29 + 1: leaves 24 bits (Dekker 1971)
        return c - (c - a)

    return torch.tensor(list(accumulate(x.tolist(), add)), dtype=torch.float64, device=x.device)


def _lloyd(v: Tensor, w: Tensor, centres: Tensor, steps: int) -> Tensor:
    v, order = v.sort()
    zero = v.new_zeros(1)
    mass = torch.cat([zero, w[order].cumsum(0)])
    moment = torch.cat([zero, (w[order] * v).cumsum(0)])
    tolerance = TOLERANCE * float(v.var(unbiased=False))
    for _ in range(steps):
        inner = torch.searchsorted(v, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(v))])
        own = mass[edges[1:]] - mass[edges[:-1]]
        means = (moment[edges[1:]] - moment[edges[:-1]]) / torch.where(own > 0, own, 1.0)
        # Values of weight 0 may leave a centre nothing; it stays.
        moved = torch.where(own > 0, means, centres).sort().values
        shift = float((moved - centres).square().sum())
        centres = moved
        if shift <= tolerance:
            break
    return centres
