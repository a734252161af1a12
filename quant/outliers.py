"""Which columns of a weight are best kept in floating point.

owq    λ_j ||w_j - ŵ_j||², λ_j = H_jj, ŵ plainly rounded: what a column costs (OWQ, Lee et al. 2023, arXiv 2306.02272). A column that
       stretches the range lies at its end, nearly exact, and by this score the columns that it spoils would be kept instead. So
       there are two candidates, from ŵ on the whole range and on the range without the most extreme weights of every row; the one
       with less left over, Σ λ_j ||w_j - ŵ_j||² of the other columns on ranges of their own, is taken, the first if equal (departure).
quik   H_jj, the mean square of the input (QUIK, Ashkboos et al. 2023, arXiv 2310.09259, whose code takes the greatest |x|: a
       statistic of its own, for a ranking that seldom differs)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def without_extremes(w: Tensor, count: int) -> Tensor:
    """w `[..., g]` with the `count` weights farthest from the median, at most a quarter of them and at least one, at the median."""
    g = w.shape[-1]
    middle = w.median(-1, keepdim=True).values
    index = (w - middle).abs().topk(min(count, max(1, g // 4)), -1).indices
    return w.scatter(-1, index, middle.expand(index.shape))


def without_columns(w: Tensor, columns: Tensor) -> Tensor:
    """w `[N, G, g]` in which `columns` of the G g have given way to another of their row and group, which leaves the range to the
    others; 0 where a whole group is among them."""
    n, count, width = w.shape
    stays = torch.ones(count * width, dtype=torch.bool, device=w.device)
    stays[columns] = False
    stays = stays.view(count, width)
    first = stays.float().argmax(1).view(1, -1, 1).expand(n, -1, 1)
    stand_in = w.gather(2, first) * stays.any(1).view(1, -1, 1)
    return torch.where(stays, w, stand_in)


def outlier_columns(
    metric: str, weight: Tensor, hessian_diagonal: Tensor, count: int, width: int, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """weight `[N, K]`, diagonal `[K]`, `width` columns per group ▸ int64 `[count]`, ascending; ties by number.

    `metric` is owq or quik; `rounded` gives the weight `[N, K]` rounded on the ranges of other values `[N, K / width, width]`.
    Raises ValueError where no column would be left."""
    k = weight.shape[1]
    if not 0 <= count < k:
        raise ValueError(f"outlier_columns={count} of {k} inputs leaves none to quantize; give 0 to {k - 1}")

    def largest(score: Tensor) -> Tensor:
        return torch.argsort(score, descending=True, stable=True)[:count].sort().values

    def cost(values: Tensor) -> Tensor:
        return hessian_diagonal * (weight - rounded(values)).square().sum(0)

    if metric == "quik":
        return largest(hessian_diagonal)
    groups = weight.reshape(-1, k // width, width)
    candidates = [largest(cost(groups)), largest(cost(without_extremes(groups, count)))]
    left_over = [float(cost(without_columns(groups, c)).index_fill(0, c, 0).sum(dtype=torch.float64)) for c in candidates]
    return candidates[0] if left_over[0] <= left_over[1] else candidates[1]
