"""Which columns of a weight are best kept in floating point.

owq    λ_j ||w_j - ŵ_j||², λ_j = H_jj, ŵ plainly rounded: what a column costs (OWQ, Lee et al. 2023, arXiv 2306.02272)
quik   H_jj, the mean square of the input (QUIK, Ashkboos et al. 2023, arXiv 2310.09259, whose code takes the greatest |x|: a
       statistic of its own, for a ranking that seldom differs)
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("owq", "quik")


def sensitive_columns(metric: str, weight: Tensor, rounded: Tensor, hessian_diagonal: Tensor, count: int) -> Tensor:
    """weight and its plain rounding `[N, K]`, diagonal `[K]` ▸ int64 `[count]`, ascending: the columns of largest score, ties by number.

    `metric` is one of METRICS. Raises ValueError where no column would be left."""
    k = weight.shape[1]
    if not 0 <= count < k:
        raise ValueError(f"outlier_columns={count} of {k} inputs leaves none to quantize; give 0 to {k - 1}")
    score = hessian_diagonal if metric == "quik" else hessian_diagonal * (weight - rounded).square().sum(0)
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values
