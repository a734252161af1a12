"""Bits of groups by salience (SliM-LLM, arXiv 2405.14917, "salience-determined bit allocation").

A group's salience is the sum of w² / U_jj² over its weights, H⁻¹ = UᵀU. Of G groups the p least salient get N - 1 bits and the p most
salient N + 1, so that the mean stays N; p is the candidate whose plainly rounded weight changes the layer's output least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.factors import inverse_factor
from quant.grids import GRIDS, fit

LEAST_PROBABILITY = 1e-6
CHUNK = 2**22
"""Outputs (tokens x rows) held at a time."""


def salience(w: Tensor, upper: Tensor, size: int) -> Tensor:
    """`[G]`: sum of w² / U_jj² over all rows and the columns of each group of `size`."""
    return (w / upper.diagonal()).square().sum(0).view(-1, size).sum(1)


def labelled(salience: Tensor, p: int, bits: int) -> tuple[int, ...]:
    """Bits of each group: the p least salient one less, the p most salient one more."""
    widths = [bits] * salience.numel()
    order = torch.argsort(salience, stable=True).tolist()
    for low, high in zip(order[:p], order[len(order) - p :], strict=True):
        widths[low], widths[high] = bits - 1, bits + 1
    return tuple(widths)


def binary(w: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """w `[..., g]` ▸ scale and mean `[...]` of 1 bit: mean |w|, or mean |w - mean| where `centred`. Constant values have the scale 0."""
    mean = w.mean(-1)
    scale = (w - mean[..., None] if centred else w).abs().mean(-1)
    constant = w.amax(-1) == w.amin(-1)
    return torch.where(constant, 0.0, scale), torch.where(constant, w[..., 0], mean)


def check_binary(scale: Tensor, mean: Tensor, stored_scale: Tensor, stored_mean: Tensor) -> None:
    """Raises ScaleDtypeError where scales and means of 1 bit are not stored closely enough."""
    # Off by half a scale would change signs; a sixteenth is allowed, and float16's own precision for a constant group.
    bound = torch.where(scale == 0, mean.abs() * 2.0**-10, scale / 16)
    wrong = ~((stored_scale - scale).abs() + (stored_mean - mean).abs() <= bound)
    if bool(wrong.any()):
        raise ScaleDtypeError(f"{int(wrong.sum())} of {wrong.numel()} scales and means of 1-bit groups do not fit float16")


def rounded_group(w: Tensor, bits: int, *, centred: bool) -> Tensor:
    """w `[N, g]` plainly rounded: g_asym per row, or mean ± scale with 1 bit."""
    if bits > 1:
        return fit(GRIDS["g_asym"], w, bits, torch.float32).round(w)
    scale, mean = binary(w, centred=centred)
    return torch.where(w >= mean[:, None], 1.0, -1.0) * scale[:, None] + mean[:, None]


def bit_allocation(
    w: Tensor,
    hessian: Tensor,
    samples: Tensor | None,
    bias: Tensor | None,
    bits: int,
    size: int,
    objective: str,
    *,
    corrected: bool,
) -> tuple[int, dict[str, float], list[str]]:
    """w `[N, K]`, positive definite Hessian `[K, K]`, samples `[S, T, K]`, bias `[N]` ▸ p, the loss of every candidate (kl in nats
    per token, mse per output), and notes.

    Candidates are 1 .. G / 2 - 1, and 0 .. G / 2 where `corrected`. KL is that of the softmax over outputs of the rounded layer from
    the unquantized one's, probabilities at least 1e-6; the reference leaves the bias out of the rounded layer."""
    groups = w.shape[1] // size
    candidates = range(groups // 2 + 1) if corrected else range(1, groups // 2)
    if not candidates:
        return 0, {}, [f"{groups} groups are too few to give some more bits than others: all have {bits}"]
    if samples is None or not samples.numel():
        return 0, {}, [f"no calibration samples reached this input: all groups have {bits} bits"]
    if candidates[-1] == 0:
        return 0, {}, []
    upper, _ = inverse_factor(hessian, 0.0)
    order = torch.argsort(salience(w, upper, size), stable=True).tolist()
    columns = [slice(g * size, (g + 1) * size) for g in range(groups)]
    plain = torch.cat([rounded_group(w[:, c], bits, centred=corrected) for c in columns], dim=1)

    def change(group: int, to: int) -> tuple[slice, Tensor]:
        c = columns[group]
        return c, rounded_group(w[:, c], to, centred=corrected) - plain[:, c]

    steps = [(change(order[p], bits - 1), change(order[groups - 1 - p], bits + 1)) for p in range(candidates[-1])]
    total = torch.zeros(len(steps) + 1, dtype=torch.float64)
    tokens = samples.reshape(-1, w.shape[1])
    shift = 0.0 if bias is None else bias.detach().to(w)
    chunk = max(1, CHUNK // w.shape[0])
    for start in range(0, tokens.shape[0], chunk):
        x = tokens[start : start + chunk].to(w)
        target = x @ w.T + shift
        output = x @ plain.T + (shift if corrected else 0.0)
        total[0] += _loss(output, target, objective)
        for p, step in enumerate(steps):
            for c, difference in step:
                output.addmm_(x[:, c], difference.T)
            total[p + 1] += _loss(output, target, objective)
    total /= tokens.shape[0] * (w.shape[0] if objective == "mse" else 1)
    losses = {p: float(total[p]) for p in candidates}
    best = min(losses, key=lambda p: losses[p])
    return best, {str(p): v for p, v in losses.items()}, []


def _loss(output: Tensor, target: Tensor, objective: str) -> float:
    """Summed over tokens `[M, N]`."""
    if objective == "mse":
        return float((output - target).square().sum(dtype=torch.float64))
    p, q = (y.softmax(-1).clamp(min=LEAST_PROBABILITY) for y in (output, target))
    return float((p * (p / q).log()).sum(dtype=torch.float64))
