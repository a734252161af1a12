"""In torch operations, with the searches by whichever twin works best; any device and float type. The host waits for nothing on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.binary import binarize, rounded
from quant.kernels.braq_block import SPLITS, Binarized, Solve, Wanted
from quant.kernels.braq_search import chosen
from quant.tensors.binary import decode


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


def masks(m: Tensor, counts: range) -> tuple[Tensor, Tensor]:
    """Saliency `[N, C]` ▸ salient columns `[C]`, split `[N, C]`."""
    run = chosen(m).run
    order = ranked(m.abs().sum(0))
    ordered = m[:, order]
    # The host never waits for a count or a threshold: a GPU goes from block to block.
    k = first_least(run.order_two_errors(ordered, counts)) + counts[0]
    salient = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, torch.arange(len(order), device=order.device) < k)
    # The zeros of salient columns count in the quantiles.
    thresholds = reference_quantiles(m.masked_fill(salient, 0).abs())
    errors = run.split_errors(ordered, thresholds, skip=k)
    return salient, (m.abs() >= thresholds.gather(0, first_least(errors)[None])) & ~salient


def solver(weight: Tensor, upper: Tensor, wanted: Wanted, out: Binarized) -> Solve:
    def solve(start: int) -> Tensor:
        end, b = min(start + wanted.block_size, weight.shape[1]), start // wanted.block_size
        block, diagonal = weight[:, start:end], upper.diagonal()[start:end]
        salient, split = masks(block.square() / diagonal.square() if wanted.hessian else block, wanted.counts(end - start))
        low, high, twice = binarize(block, ~salient & ~split, 1), binarize(block, split, 1), binarize(block, salient, 2)
        found = torch.stack([low.mean[0], high.mean[0], twice.mean[0] + twice.mean[1]], dim=1)
        (scale, mean), wrong = rounded([torch.stack([low.scale[0], high.scale[0], *twice.scale], dim=1), found], wanted.dtype)
        signs, second = torch.where(salient, twice.signs[0], torch.where(split, high.signs[0], low.signs[0])), twice.signs[1] & salient
        out.signs[:, start:end], out.second[:, start:end], out.split[:, start:end], out.salient[start:end] = signs, second, split, salient
        out.scale[:, b], out.mean[:, b] = scale, mean
        out.wrong.add_(wrong)
        return (block - decode(signs, second, split, salient, scale, mean)) / diagonal

    return solve
