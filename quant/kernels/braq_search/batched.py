"""All candidates at once, in torch operations without a loop over columns or rows; any device. Rows go in chunks, for the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 2**17
"""Values in a temporary tensor."""


def chunks(x: Tensor, values_per_row: int) -> Iterator[Tensor]:
    """Rows of `[N, ...]` in pieces whose temporary tensors hold about CHUNK values."""
    rows = max(1, CHUNK // max(1, values_per_row))
    return (x[i : i + rows] for i in range(0, x.shape[0], rows))


def order_two_errors(m: Tensor, counts: Sequence[int]) -> Tensor:
    """Squared error, float64, for each count k: the first k columns of `[N, C]` and the rest are each binarized twice, with
    means (step b of the reference)."""
    c = m.shape[1]
    ks = torch.tensor(counts, device=m.device)
    inside = torch.arange(c, device=m.device) < ks[:, None]
    sets = torch.stack([inside, ~inside], dim=2).to(m)  # [k, C, 2]
    sizes = sets.sum(1, keepdim=True).clamp(min=1)  # [k, 1, 2]
    total = torch.zeros(len(counts), dtype=torch.float64, device=m.device)
    for rows in chunks(m, len(counts) * c):
        x = rows.expand(len(counts), -1, -1)  # [k, n, C]
        mean = x @ sets / sizes
        spread = sets.transpose(1, 2)
        centred = torch.baddbmm(x, mean, spread, alpha=-1)
        scale = centred.abs() @ sets / sizes
        left = centred - torch.copysign(scale @ spread, centred)
        second_mean = left @ sets / sizes
        second_scale = torch.baddbmm(left, second_mean, spread, alpha=-1).abs() @ sets / sizes
        total += left.square().sum((1, 2), dtype=torch.float64)
        total -= (sizes * (second_mean.square() + second_scale.square())).sum((1, 2), dtype=torch.float64)
    return total


def split_errors(x: Tensor, thresholds: Tensor, skip: Tensor | None = None) -> Tensor:
    """Squared error `[T]`, float64, of x `[N, C]` split at |x| >= t, both parts binarized once with means (step c of the
    reference). Thresholds `[T]` are 0 or more."""
    x = x if skip is None else x[:, int(skip) :]
    total = torch.zeros(thresholds.numel(), dtype=torch.float64, device=x.device)
    for rows in chunks(x, 8 * (x.shape[1] + thresholds.numel())):
        total += _split_errors(rows, thresholds)
    return total


def _split_errors(x: Tensor, thresholds: Tensor) -> Tensor:
    n, c = x.shape
    ordered = x.sort(1).values
    t = thresholds.to(x).expand(n, -1).contiguous()
    # Low values fill [a, b) of a sorted row; high ones are its two ends.
    a, b = torch.searchsorted(ordered, -t, right=True), torch.searchsorted(ordered, t)
    # A threshold of 0 has no low values, and those equal to it are high.
    b = torch.maximum(a, b)
    wide = ordered.double()
    sums = torch.nn.functional.pad(wide.cumsum(1), (1, 0))
    squares = wide.square().sum(1, keepdim=True)
    inner = sums.gather(1, b) - sums.gather(1, a)
    outer = sums[:, -1:] - inner
    count_in = (b - a).double()
    count_out = c - count_in
    mean_in, mean_out = inner / count_in.clamp(min=1), outer / count_out.clamp(min=1)

    below = torch.searchsorted(wide, mean_in).clamp(a, b)
    under, number = sums.gather(1, below) - sums.gather(1, a), (below - a).double()
    spread_in = _deviation(inner, count_in, under, number, mean_in)

    place = torch.searchsorted(wide, mean_out)
    left, right = torch.minimum(place, a), torch.maximum(place, b)
    under = sums.gather(1, left) + sums.gather(1, right) - sums.gather(1, b)
    spread_out = _deviation(outer, count_out, under, (left + right - b).double(), mean_out)

    errors = squares - count_in * mean_in.square() - count_out * mean_out.square()
    errors -= spread_in.square() / count_in.clamp(min=1) + spread_out.square() / count_out.clamp(min=1)
    return errors.sum(0)


def _deviation(total: Tensor, count: Tensor, under: Tensor, number: Tensor, mean: Tensor) -> Tensor:
    """Σ|x - mean| of a set, `number` of whose values, summing to `under`, lie below the mean."""
    return (total - under) - (count - number) * mean + number * mean - under
