"""k-means of all columns at once in torch. Every sum is float64 and in the order of the C++ twin, so that both give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.kmeans_columns import STEPS, TOLERANCE, bins, check, draws, trials, weights_of

TOGETHER = 128
"""Columns worked on at once: their tables of costs take 128 x 8 (bins + 1)² bytes, 17 MB with 16 centres."""


def kmeans(columns: Tensor, k: int, start: str = "partition", weights: Tensor | None = None) -> Tensor:
    """`[C, N]` ▸ centres `[C, k]`."""
    check(k, start)
    each = None if weights is None else weights_of(columns, weights)
    parts = range(0, len(columns), TOGETHER)
    made = [_some(columns[i : i + TOGETHER].double(), None if each is None else each[i : i + TOGETHER], k, start) for i in parts]
    return torch.cat(made or [columns.new_empty(0, k)]).to(columns.dtype)


def nearest(columns: Tensor, centres: Tensor) -> Tensor:
    """uint8 `[C, N]`."""
    x = columns if columns.dtype is torch.float64 else columns.float()
    c = centres.to(x.dtype)
    return torch.searchsorted((c[:, :-1] + c[:, 1:]) / 2, x.contiguous()).to(torch.uint8)


def _some(columns: Tensor, weights: Tensor | None, k: int, start: str) -> Tensor:
    x, order = columns.sort(dim=1, stable=True)
    rank = torch.nn.functional.pad((x[:, 1:] != x[:, :-1]).long().cumsum(1), (1, 0))
    # Columns with few values keep them; ranks beyond k belong to the other columns, which are overwritten.
    centres = x[:, -1:].repeat(1, k).scatter(1, rank.clamp(max=k - 1), x)
    many = rank[:, -1] >= k
    if bool(many.any()):
        given = None if weights is None else (weights[many], weights.gather(1, order)[many])
        centres[many] = _solve(columns[many], x[many], given, k, start)
    return centres


def _solve(columns: Tensor, x: Tensor, weights: tuple[Tensor, Tensor] | None, k: int, start: str) -> Tensor:
    """weights: in the columns' order and in that of the sorted values x."""
    n = x.shape[1]
    zero = x.new_zeros(x.shape[0], 1)
    own, weight = (None, torch.ones_like(x)) if weights is None else weights
    value = weight * x
    sums, squares, mass = (torch.cat([zero, v.cumsum(1)], dim=1) for v in (value, value * x, weight))
    if start == "plus_plus":
        mean = sums[:, -1] / mass[:, -1]
        return _lloyd(x, sums, mass, _plus_plus(columns, own, k), TOLERANCE * (squares[:, -1] / mass[:, -1] - mean * mean))
    at = _candidates(x, bins(k))
    cuts = _best_runs(at, sums, squares, mass, k) if bins(k) > k else at
    return _lloyd(x, sums, mass, _means(x, sums, mass, cuts, x.gather(1, cuts[:, :-1].clamp(max=n - 1))), zero[:, 0])


def _plus_plus(columns: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """Ascending centres `[C, k]`: of each round's candidates the one that leaves the least weighted squared distance."""
    n = columns.shape[1]
    numbers = draws(k)
    if weights is None:
        chosen = columns[:, min(n - 1, int(numbers[0] * n))][:, None]
    else:
        running = weights.cumsum(1)
        chosen = columns.gather(1, torch.searchsorted(running, numbers[0] * running[:, -1:], right=True).clamp(max=n - 1))

    def weighed(squares: Tensor) -> Tensor:
        return squares if weights is None else weights * squares

    centres, closest = [chosen], (columns - chosen).square()
    for given in torch.tensor(numbers[1:]).to(columns).view(k - 1, trials(k)) if k > 1 else ():
        running = weighed(closest).cumsum(1)
        at = torch.searchsorted(running, given * running[:, -1:]).clamp(max=n - 1)
        tried = columns.gather(1, at)
        lefts = [_lane_sum(weighed(torch.minimum(closest, (columns - t).square()))) for t in torch.split(tried, 1, dim=1)]
        potential = torch.cat(lefts, dim=1)
        # Two values that are each other's only gain leave the same sum but for rounding: the first counts.
        least = potential <= potential.amin(1, keepdim=True) * (1 + 1e-12)
        chosen = tried.gather(1, least.long().argmax(1, keepdim=True))
        closest = torch.minimum(closest, (columns - chosen).square())
        centres.append(chosen)
    return torch.cat(centres, dim=1).sort(dim=1).values


def _lane_sum(values: Tensor) -> Tensor:
    """`[C, N]` ▸ `[C, 1]`, in eight lanes as in C++: value i goes to lane i mod 8, and the lanes are added in order at the end."""
    lanes = torch.nn.functional.pad(values, (0, -values.shape[1] % 8)).view(values.shape[0], -1, 8)
    return lanes.cumsum(1)[:, -1].cumsum(1)[:, -1:]


def _candidates(x: Tensor, count: int) -> Tensor:
    """Cuts `[C, count + 1]` from 0 to N: equal shares of the sum of square roots of gaps (16 parts) and of count (1 part). The first
    share follows the square root of the density, close to the cube root that centres of least error follow (Panter & Dite)."""
    c, n = x.shape
    gaps = x.diff(dim=1).sqrt()
    for _ in range(2):
        # One cut in a gap is enough: no gap counts for more than two shares.
        gaps = gaps.minimum(2 * _lane_sum(gaps) / count)
    gaps = gaps.cumsum(1)
    measure = torch.cat([x.new_zeros(c, 1), gaps], dim=1) * (16 * float(n - 1) / gaps[:, -1:]) + torch.arange(n).to(x)
    wanted = measure[:, -1:] * (torch.arange(1, count).to(x) / count)
    inner = torch.searchsorted(measure, wanted.contiguous())
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n)


def _best_runs(at: Tensor, sums: Tensor, squares: Tensor, mass: Tensor, k: int) -> Tensor:
    """Cuts `[C, k + 1]`: the k runs of bins with the least error, by dynamic programming."""
    c, side = at.shape
    s, q, m = (v[:, None, :] - v[:, :, None] for v in (t.gather(1, at) for t in (sums, squares, mass)))
    below = torch.ones(side, side, dtype=torch.bool, device=at.device).tril(-1)
    cost = (q - s * s / torch.where(m > 0, m, 1.0)).masked_fill(below, torch.inf)
    least, origins, origin = cost[:, 0], [], at.new_zeros(c, side)
    index = torch.arange(side, device=at.device)[:, None]
    for _ in range(k - 1):
        # Cuts never move back when a run is added.
        least, origin = (least[:, :, None] + cost).masked_fill(index < origin[:, None, :], torch.inf).min(dim=1)
        origins.append(origin)
    b = torch.full((c, 1), side - 1, device=at.device)
    cuts = [at.gather(1, b)]
    for origin in reversed(origins):
        b = origin.gather(1, b)
        cuts.append(at.gather(1, b))
    return torch.cat([torch.zeros_like(b), *reversed(cuts)], dim=1)


def _means(x: Tensor, sums: Tensor, mass: Tensor, cuts: Tensor, centres: Tensor) -> Tensor:
    """Of the runs of values between cuts. A cluster without members keeps its centre."""
    first, last = cuts[:, :-1], cuts[:, 1:]
    weight = mass.gather(1, last) - mass.gather(1, first)
    mean = (sums.gather(1, last) - sums.gather(1, first)) / torch.where(weight > 0, weight, 1.0)
    inside = mean.maximum(x.gather(1, first.clamp(max=x.shape[1] - 1))).minimum(x.gather(1, (last - 1).clamp(min=0)))
    return torch.where(weight > 0, inside, centres)


def _lloyd(x: Tensor, sums: Tensor, mass: Tensor, centres: Tensor, tolerance: Tensor) -> Tensor:
    """From ascending centres `[C, k]`, each column until no cut moves or the squared moves of its centres are within `tolerance` `[C]`."""
    cuts = torch.nn.functional.pad(torch.zeros_like(centres[:, 1:], dtype=torch.long), (1, 0))
    cuts = torch.nn.functional.pad(cuts, (0, 1), value=x.shape[1])
    at_work = torch.ones_like(tolerance, dtype=torch.bool)
    for step in range(STEPS):
        inner = torch.searchsorted(x, (centres[:, :-1] + centres[:, 1:]) / 2, right=True)
        if step:
            at_work &= (inner != cuts[:, 1:-1]).any(1)
        if not bool(at_work.any()):
            break
        cuts = torch.cat([cuts[:, :1], inner, cuts[:, -1:]], dim=1)
        moved = torch.where(at_work[:, None], _means(x, sums, mass, cuts, centres), centres)
        shift = (moved - centres).square().cumsum(1)[:, -1]
        centres = moved
        at_work &= shift > tolerance
    return centres
