"""`hqq_pack`: HQQ's grid, half-quadratic steps on its zeros, codes and packing (`quant.methods.hqq` has the objective).

Every twin has, with the same results bit for bit,
- `zeros(groups, scale, zero, bits, search) ▸ (zero, steps)`: groups `[R, G, g]` float32, contiguous, scale and zero `[R, G, 1]`. The
  zeros after the steps, and how many were taken
- `hqq_pack(weight, bits, width, scale_dtype, search, round_zero, codes=True, stream=True, error=False) ▸ (Packed, steps)`: groups,
  and what is wanted, as of `quant.kernels.rtn_pack`; weight in any float type but float64. `told` is int32 `[3]`: groups whose sum is
  not finite; those whose first scale or zero float16 cannot hold closely enough; and so of the last zero, both with float16 only

A step is one pass over the groups, which leaves the sums to torch: their order decides the last bits of a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant.kernels.rtn_pack import Packed

MAX_HALF_ZERO = 512
"""Float16 zeros up to here are off by a quarter of a code at most."""
MOST_POWER = 2.0
"""Of the error, for twins that know from its size alone whether it is shrunk to 0."""


@dataclass(frozen=True)
class Search:
    """Parameters of the steps, as `quant.methods.hqq.Hqq` has them."""

    iters: int
    p: float
    beta: float
    kappa: float


def steps(step: Callable[[Tensor, float], tuple[Tensor, float]], zero: Tensor, search: Search) -> tuple[Tensor, int]:
    """`step(zero, beta)` gives the next zeros and mean |W - Ŵ| before; until that is no longer below the best so far."""
    best, beta = float("inf"), search.beta
    for taken in range(1, search.iters + 1):
        zero, mean = step(zero, beta)
        if mean >= best:
            return zero, taken
        best, beta = mean, beta * search.kappa
    return zero, search.iters


def untouched(p: float, beta: float) -> float:
    """Errors up to this are shrunk to 0: |E| ≤ |E|^(p-1) / β, by a margin that a rounded power does not reach."""
    return float(beta ** (-1 / (2 - p))) * (1 - 1e-5)


def packed(
    rtn: Any, zeros: Callable[..., tuple[Tensor, int]], weight: Tensor, bits: int, width: int, scale_dtype: torch.dtype,
    search: Search | None, round_zero: bool, **wanted: bool,
) -> tuple[Packed, int]:  # fmt: skip
    """By a twin of `rtn_pack` that has `fitted` and `encoded`, and the steps; None takes none."""
    groups, scale, zero, told = rtn.fitted(weight, "hqq", bits, width, scale_dtype)
    if round_zero:
        zero = zero.round()
    taken = 0
    if search is not None:
        zero, taken = zeros(groups, scale, zero, bits, search)
    zero = zero.to(scale_dtype).float()
    wrong = ~(zero.abs() <= MAX_HALF_ZERO) if scale_dtype is torch.float16 else torch.zeros_like(zero, dtype=torch.bool)
    made = rtn.encoded(weight.shape, groups, scale, zero, "hqq", bits, scale_dtype, **wanted)
    return replace(made, told=torch.cat([told, wrong.sum()[None].to(told)])), taken
