"""BiLLM's rules as plain loops over rows, candidates and blocks, in float64: what the vectorized searches are held to."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from quant.statistics import Statistics, collect

KINDS = frozenset({"hessian"})


def slow_binarize(x: Tensor, mask: Tensor, order: int, means: bool) -> Tensor:
    """Row by row, entry by entry of the mask."""
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        values = x[i][mask[i]]
        total = torch.zeros_like(values)
        for _ in range(order if values.numel() else 0):
            left = values - total
            mean = left.mean() if means else left.new_zeros(())
            scale = (left - mean).abs().mean()
            total = total + torch.where(left - mean >= 0, scale, -scale) + mean
        out[i][mask[i]] = total
    return out


def error(x: Tensor, *parts: tuple[Tensor, int], means: bool) -> float:
    return float((x - sum(slow_binarize(x, m, order, means) for m, order in parts)).square().sum())


def top(score: Tensor, shape: torch.Size, k: int) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, torch.argsort(score, descending=True, stable=True)[:k]] = True
    return mask


def quantiles(values: Tensor) -> list[float]:
    """0.10, 0.11 .. 0.90, linear; positions as exact fractions."""
    ordered = sorted(values.flatten().tolist())
    out = []
    for percent in range(10, 91):
        at = Fraction(percent * (len(ordered) - 1), 100)
        i = at.numerator // at.denominator
        out.append(ordered[i] + float(at - i) * (ordered[min(i + 1, len(ordered) - 1)] - ordered[i]))
    return out


def reference_masks(m: Tensor) -> tuple[Tensor, Tensor]:
    """Steps b and c of the published code on M `[N, C]`: salient and high masks `[N, C]`."""
    score = m.abs().sum(0)
    errors = []
    for k in range(1, min(49, m.shape[1]) + 1):
        salient = top(score, m.shape, k)
        errors.append(error(m, (salient, 2), (~salient, 2), means=True))
    salient = top(score, m.shape, 1 + int(np.argmin(errors)))
    thresholds = quantiles(torch.where(salient, 0.0, m).abs())
    errors = []
    for t in thresholds:
        high = ~salient & (m.abs() >= t)
        errors.append(error(m, (high, 1), (~salient & ~high, 1), (salient, 2), means=True))
    return salient, ~salient & (m.abs() >= thresholds[int(np.argmin(errors))])


def paper_masks(w: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
    most = min(30, w.shape[1])
    counts = list(range(min(3, most), most + 1))
    masks = [top(saliency.sum(0), w.shape, k) for k in counts]
    salient = masks[int(np.argmin([error(w, (s, 2), (~s, 1), means=False) for s in masks]))]
    highs = [~salient & (w.abs() >= f / 10 * w[~salient].abs().max()) for f in range(1, 10)] if not salient.all() else [~salient]
    errors = [error(w, (h, 1), (~salient & ~h, 1), (salient, 2), means=False) for h in highs]
    return salient, highs[int(np.argmin(errors))]


def joint_masks(w: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
    thresholds = quantiles(w.abs())
    best, found = float("inf"), None
    for k in range(min(49, w.shape[1]) + 1):
        salient = top(saliency.sum(0), w.shape, k)
        for t in thresholds:
            high = ~salient & (w.abs() >= t)
            e = error(w, (high, 1), (~salient & ~high, 1), (salient, 2), means=False)
            if e < best * (1 - 1e-12):
                best, found = e, (salient, high)
    assert found is not None
    return found


def layer(n: int, k: int, seed: int, dtype: torch.dtype = torch.float64, tokens: int = 256) -> tuple[Tensor, Statistics]:
    """Gaussian weights, correlated inputs whose channels have log-normal scales."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g, dtype=dtype)
    mixed = torch.randn(4, tokens, k, generator=g) @ (torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5)
    return w, collect(mixed * torch.randn(k, generator=g).exp(), KINDS)


def output_error(w: Tensor, q: Tensor, statistics: Statistics) -> float:
    """||(W - Q) X||² / ||W X||²."""
    assert statistics.hessian is not None
    h, d = statistics.hessian.double(), (w - q).double()
    return float(((d @ h) * d).sum() / ((w.double() @ h) * w.double()).sum())
