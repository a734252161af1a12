"""Residual binarization: x ≈ Σ_k (sign(r_k - μ_k) α_k + μ_k) on a mask, row by row.

r_1 = x, μ_k the mean of r_k over the row's masked entries, α_k the mean of |r_k - μ_k|, r_(k+1) what is left (BiLLM, Huang
et al. 2024, arXiv 2402.04291, eq. 4 to 7; XNOR-Net for the first order). Rows without masked entries have α = μ = 0.
Departure: sign(0) is +1, as a sign is stored in one bit; the reference code's sign(0) is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError


@dataclass(frozen=True)
class Binarized:
    """Lists have one entry per order."""

    value: Tensor
    """`[N, C]`: 0 outside the mask."""
    signs: list[Tensor]
    """bool `[N, C]`: True is +1."""
    scale: list[Tensor]
    """α `[N]`."""
    mean: list[Tensor]
    """μ `[N]`; zeros without means."""


def binarize(x: Tensor, mask: Tensor, order: int, *, means: bool = True) -> Binarized:
    """x `[N, C]`, mask bool `[N, C]` or `[C]`, order 1 or more. Works in the float type of x."""
    mask = mask.expand_as(x)
    count = mask.sum(1).clamp(min=1).to(x)
    value = torch.zeros_like(x)
    out = Binarized(value, [], [], [])
    for _ in range(order):
        rest = (x - value).masked_fill(~mask, 0)
        mean = rest.sum(1) / count if means else torch.zeros_like(count)
        centred = (rest - mean[:, None]).masked_fill(~mask, 0)
        scale = centred.abs().sum(1) / count
        positive = centred >= 0
        value += (torch.where(positive, scale[:, None], -scale[:, None]) + mean[:, None]).masked_fill(~mask, 0)
        out.signs.append(positive)
        out.scale.append(scale)
        out.mean.append(mean)
    return out


def stored(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As `rounded`. Raises ScaleDtypeError where something does not fit."""
    kept, wrong = rounded(values, dtype)
    must_fit(wrong, sum(v.numel() for v in values), dtype)
    return kept


def rounded(values: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Scales `[N, P]` and means `[N, M]` of the same weights, rounded to their stored type but kept in their float type; and how many of
    them, int64 `[]` on their device, are off by more than 2^-10 of the row's largest."""
    largest = reduce(torch.maximum, (v.abs().amax(1, keepdim=True) for v in values))
    kept = [v.to(dtype).to(v.dtype) for v in values]
    # NaN, from infinity, is not within the bound either.
    wrong = [(~((k - v).abs() <= 2.0**-10 * largest)).sum() for k, v in zip(kept, values, strict=True)]
    return kept, reduce(torch.add, wrong)


def must_fit(wrong: Tensor, number: int, dtype: torch.dtype) -> None:
    """Raises ScaleDtypeError where `wrong` of `number` is not 0; waits for the device."""
    count = int(wrong)
    if count:
        raise ScaleDtypeError(f"{count} of {number} scales or means do not fit {str(dtype).removeprefix('torch.')}")
