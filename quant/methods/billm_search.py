"""The searches of BiLLM's variants without means in one block `[N, C]`: which columns are salient, and where the others are split into low
and high. Those of the reference are the kernels `braq_block` and `braq_search`.

All candidates are scored at once, without a loop over columns or rows. A set of n values binarized once leaves Σx² - n α², α the mean of
|x|; a second order takes n α₂² off. Sets that differ by the count of salient columns are prefixes of the ranked columns; sets that differ
by the threshold are those values that reach it (histograms). Rows go in chunks, for the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.kernels.braq_search.batched import chunks


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
