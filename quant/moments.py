"""Shape of a tensor's distribution: kurtosis, and how far its largest value lies out.

Both say what a uniform grid of few levels does to it: one scale must reach absmax, so the step, and with it the error of every
other value, grows with absmax / σ; kurtosis says whether that reach is the tail's or one value's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Values taken to float64 at a time: 8 MB, and a few times that for their powers."""
FLAT = 1e-5
"""Least σ² / mean of squares. Central moments come from raw ones, which loses (mean / σ)⁴ in precision: at this bound kurtosis still
has a relative error of about 16 x 1e10 x 2^-53 = 2e-5; below it the tensor is a constant for our purposes."""


@dataclass(frozen=True)
class Moments:
    """Of all values of a tensor together."""

    count: int
    mean: float
    std: float
    """σ of these values (divided by their number, not by one less)."""
    absmax: float
    kurtosis: float | None
    """Fourth central moment / σ⁴, not excess: 3 for a normal distribution, 1.8 for a uniform one. None without spread (see FLAT)."""
    absmax_sigma: float | None
    """absmax / σ; None without spread."""


class MomentSums:
    """Raw sums of x, x², x³, x⁴ and max |x|, in float64. One `update` per sequence: how sequences were batched changes no bit."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | None = None
        self._absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """x: any shape and floating-point dtype, not changed; an empty one adds nothing."""
        for part in torch.split(x.detach().reshape(-1), CHUNK):
            if not part.numel():
                continue
            v = part.double()
            square = v * v
            sums = torch.stack([v.sum(), square.sum(), (square * v).sum(), (square * square).sum()])
            peak = v.abs().amax()
            self._sums = sums if self._sums is None else self._sums + sums
            self._absmax = peak if self._absmax is None else torch.maximum(self._absmax, peak)
            self._count += part.numel()

    def value(self) -> Moments:
        """Zeros, and no kurtosis, where nothing came. NaN or infinite where a value was."""
        if self._sums is None or self._absmax is None:
            return Moments(0, 0.0, 0.0, 0.0, None, None)
        m1, m2, m3, m4 = (self._sums / self._count).tolist()
        absmax = float(self._absmax)
        variance = m2 - m1 * m1
        std = math.sqrt(max(variance, 0.0))
        if variance <= FLAT * m2:
            return Moments(self._count, m1, std, absmax, None, None)
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return Moments(self._count, m1, std, absmax, fourth / variance**2, absmax / std)


def moments(x: Tensor) -> Moments:
    """Of one tensor of any shape and floating-point dtype."""
    sums = MomentSums()
    sums.update(x)
    return sums.value()
