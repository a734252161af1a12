"""The searches of BiLLM in one block `[N, C]`: which columns are salient, and where the others are split into low and high.

All candidates are scored at once, without a loop over columns or rows. A set of n values binarized once leaves
Σ(x - μ)² - n α², μ its mean and α the mean of |x - μ|; each further order takes n μ_k² + n α_k² off. Sets that differ by the
count of salient columns are prefixes of the ranked columns (sums by one small product per candidate); sets that differ by the
threshold are intervals of a sorted row, or its two ends (prefix sums). Rows go in chunks, for the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.kernels.braq_search import chosen
from quant.kernels.braq_search.batched import chunks

SPLITS = 81


def ranked(score: Tensor) -> Tensor:
    """Columns by decreasing score `[C]`; ties keep their order."""
    return torch.argsort(score, descending=True, stable=True)


def reference_quantiles(values: Tensor) -> Tensor:
    """The 81 quantiles 0.10, 0.11 .. 0.90 of all values, interpolated linearly."""
    ordered = values.reshape(-1).sort().values
    # Exact in integers, so that a quantile that falls on a value equals it.
    place = torch.arange(10, 10 + SPLITS, device=values.device) * (ordered.numel() - 1)
    below = place // 100
    above = (below + 1).clamp(max=ordered.numel() - 1)
    fraction = (place % 100).to(values) / 100
    return ordered[below] + (ordered[above] - ordered[below]) * fraction


def first_least(errors: Tensor) -> Tensor:
    """int64 `[]` on their device: index of the least value, the first of equal ones, in the flattened tensor."""
    flat = errors.reshape(-1)
    index = torch.arange(flat.numel(), device=flat.device)
    return torch.where(flat == flat.min(), index, flat.numel()).min()


# --- counts of salient columns --------------------------------------------------------------------------------------


def order_two_errors(m: Tensor, counts: Sequence[int]) -> Tensor:
    """By the kernel `braq_search`: step b of the reference."""
    found: Tensor = chosen(m).run.order_two_errors(m, counts)
    return found


def salient_errors(magnitude: Tensor, counts: Sequence[int]) -> Tensor:
    """Squared error `[k]`, float64, of the first k columns of |w| `[N, C]` binarized twice without means, for each count k."""
    largest = max(counts)
    ks = torch.tensor(counts, device=magnitude.device)
    inside = (torch.arange(largest, device=magnitude.device) < ks[:, None]).to(magnitude)  # [k, largest]
    sizes = ks.clamp(min=1).to(magnitude)
    total = torch.zeros(len(counts), dtype=torch.float64, device=magnitude.device)
    for rows in chunks(magnitude[:, :largest], len(counts) * largest):
        scale = rows @ inside.T / sizes  # [n, k]
        left = (rows[:, None, :] - scale[:, :, None]) * inside
        second = left.abs().sum(2) / sizes
        total += (left.square().sum(2) - sizes * second.square()).sum(0, dtype=torch.float64)
    return total


# --- thresholds -----------------------------------------------------------------------------------------------------


def split_errors(x: Tensor, thresholds: Tensor, skip: Tensor | None = None) -> Tensor:
    """By the kernel `braq_search`: step c of the reference."""
    found: Tensor = chosen(x).run.split_errors(x, thresholds, skip)
    return found


def joint_errors(magnitude: Tensor, counts: range, thresholds: Tensor) -> Tensor:
    """Squared error `[k, T]`, float64, of |w| `[N, C]`: the first k columns binarized twice, the others split at t and both parts
    binarized once, all without means."""
    c = magnitude.shape[1]
    largest, bins = max(counts), thresholds.numel()
    ks = torch.tensor(counts, device=magnitude.device)
    total = torch.zeros(len(counts), bins, dtype=torch.float64, device=magnitude.device)
    taken = slice(counts[0], counts[-1] + 1)
    thresholds = thresholds.to(magnitude).contiguous()
    for rows in chunks(magnitude, (largest + 1) * bins):
        number = torch.bucketize(rows.contiguous(), thresholds, right=True)  # thresholds that a value reaches
        high_count, high_sum = (_reached(number, w, bins) for w in (torch.ones_like(rows), rows))
        reached = (number[:, :largest, None] > torch.arange(bins, device=rows.device)).to(rows)
        # What the first k columns hold, k = 0 .. largest: to be taken off.
        high_count = high_count[:, None] - _prefixes(reached)[:, taken]
        high_sum = high_sum[:, None] - _prefixes(reached * rows[:, :largest, None])[:, taken]
        rest_sum = (rows.sum(1, keepdim=True) - _prefixes(rows[:, :largest, None])[:, taken, 0])[:, :, None]
        low_count, low_sum = (c - ks).to(rows)[None, :, None] - high_count, rest_sum - high_sum
        explained = high_sum.square() / high_count.clamp(min=1) + low_sum.square() / low_count.clamp(min=1)
        squares = rows.square()
        rest = squares.sum(1, keepdim=True) - _prefixes(squares[:, :largest, None])[:, taken, 0]
        total += rest.sum(0, dtype=torch.float64)[:, None] - explained.sum(0, dtype=torch.float64)
    return total + salient_errors(magnitude, counts)[:, None]


def _reached(number: Tensor, weight: Tensor, bins: int) -> Tensor:
    """`[n, T]`: Σ of the weights of the values that reach threshold i."""
    histogram = weight.new_zeros(number.shape[0], bins + 1).scatter_add_(1, number, weight)
    return histogram.flip(1).cumsum(1).flip(1)[:, 1:]


def _prefixes(x: Tensor) -> Tensor:
    """`[n, L, T]` ▸ `[n, L + 1, T]`: sums of the first 0 .. L."""
    return torch.nn.functional.pad(x.cumsum(1), (0, 0, 1, 0))
