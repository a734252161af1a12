"""Plain k-means of one column after the other: Lloyd's algorithm from a greedy k-means++ start (Arthur & Vassilvitskii 2007)."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.kmeans_columns import STEPS, TOLERANCE, check, draws, trials, weights_of


def kmeans(columns: Tensor, k: int, start: str = "plus_plus", weights: Tensor | None = None) -> Tensor:
    """`[C, N]` ▸ centres `[C, k]`. Raises ValueError for start=partition, which is the fast backends' own."""
    check(k, start)
    if start != "plus_plus":
        raise ValueError(f"start={start!r}: the reference starts by plus_plus only; choose another backend")
    each = weights_of(columns, torch.ones_like(columns) if weights is None else weights)
    return torch.stack([one_column(column.double(), w, k) for column, w in zip(columns, each, strict=True)]).to(columns)


def nearest(columns: Tensor, centres: Tensor) -> Tensor:
    """uint8 `[C, N]`."""
    return torch.stack([closest(x.double(), c.double()) for x, c in zip(columns, centres, strict=True)]).to(torch.uint8)


def closest(x: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest of `[k]` for each of `[N]`, the first where two are equally near."""
    return (x[:, None] - centres[None, :]).abs().argmin(1)


def one_column(x: Tensor, weights: Tensor, k: int) -> Tensor:
    distinct = torch.unique(x)
    if distinct.numel() <= k:
        return torch.cat([distinct, distinct[-1:].expand(k - distinct.numel())])
    centres = plus_plus(x, weights, k).sort().values
    codes = torch.full_like(x, -1)
    mean = (weights * x).sum() / weights.sum()
    variance = float((weights * (x - mean).square()).sum() / weights.sum())
    for _ in range(STEPS):
        before, codes = codes, closest(x, centres)
        if torch.equal(before, codes):
            break
        # A cluster without members keeps its centre.
        mass = torch.stack([weights[codes == c].sum() for c in range(k)])
        moved = torch.stack([(weights * x)[codes == c].sum() / mass[c] if mass[c] > 0 else centres[c] for c in range(k)])
        shift = float((moved - centres).square().sum())
        centres = moved
        if shift <= TOLERANCE * variance:
            break
    return centres


def plus_plus(x: Tensor, weights: Tensor, k: int) -> Tensor:
    """The first centre at random, in proportion to weights; then candidates drawn in proportion to the weighted squared distance to the
    nearest centre, of which the one that leaves the least sum of these is taken."""
    numbers = iter(draws(k))
    running = weights.cumsum(0)
    centres = x[min(int(torch.searchsorted(running, next(numbers) * running[-1], right=True)), x.numel() - 1)].view(1)

    def left(chosen: Tensor) -> Tensor:
        return weights * (x[:, None] - chosen[None, :]).square().amin(1)

    while centres.numel() < k:
        running = left(centres).cumsum(0)
        options = []
        for _ in range(trials(k)):
            at = int(torch.searchsorted(running, next(numbers) * running[-1]))
            options.append(torch.cat([centres, x[at].view(1)]))
        sums = [float(left(some).sum()) for some in options]
        # Two values that are each other's only gain leave the same sum but for rounding: the first counts.
        centres = options[next(i for i, s in enumerate(sums) if s <= min(sums) * (1 + 1e-12))]
    return centres
