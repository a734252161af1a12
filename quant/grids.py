"""The grids that the reference repositories all call "min-max". They differ; each has a name here.

name        range                                     scale                              zero
g_asym      min/max, extended to hold 0;              (max - min) / (2^b - 1)            round(-min / s)
            an all-zero group is [-1, 1]
g_sym       M = max |w|: [-M, M] if any is negative,  (max - min) / (2^b - 1)            2^(b-1)
            else [0, M]
awq_asym    min/max, at least 1e-5 wide               (max - min) / (2^b - 1)            round(-min / s) within the codes
omni        min/max                                   (max - min) / (2^b - 1) in         round(-min / s) within ±1e4
                                                      [1e-5, 1e4]
q_sym       M = max |w|                               M / (2^(b-1) - 1)                  2^(b-1)
hqq         min/max                                   1 / ((2^b - 1) / (max - min)),     -min / s, not rounded
                                                      inverse at most 2e4; 1 if the
                                                      range is at most 1e-4
kivi        min/max                                   (max - min) / (2^b - 1)            the minimum itself
absmax      M = max |w|, at least 1e-5                M / (2^(b-1) - 1)                  2^(b-1)

Sources: GPTQ, AWQ, OmniQuant, QuaRot/SpinQuant, HQQ, KIVI and SmoothQuant's code, in that order of names.
`mse=True` shrinks the range by p = 1 - i/100 for i = 0..79 and keeps the p of least sum |w - ŵ|^2.4 per group
(GPTQ's option, which works on every grid here).
Departures: a group of equal values holds 0 in omni, too; an all-zero group has the scale 1 where the reference divides by
(nearly) zero; it decodes to 0 either way.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind, grouped
from quant.errors import ScaleDtypeError
from quant.scheme import WeightScheme

DTYPES = {"float16": torch.float16, "float32": torch.float32}
MSE_STEPS = 80
MSE_POWER = 2.4

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Grid:
    """A row of the table above."""

    name: str
    zero: ZeroKind
    limits: Callable[[Tensor], Range]
    """Values `[..., g]` ▸ (low, high), each `[..., 1]`."""
    step: Callable[[Tensor, Tensor, int], Tensor]
    """(low, high, bits) ▸ scale."""

    @property
    def symmetric(self) -> bool:
        return self.zero is ZeroKind.CONSTANT


def _with_zero(w: Tensor) -> Range:
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def _mirrored(w: Tensor) -> Range:
    low, high = _plain(w)
    m = torch.maximum(-low, high)
    signed = (low < 0) | (m == 0)
    m = torch.where(m == 0, 1.0, m)
    return torch.where(signed, -m, 0.0), m


def _plain(w: Tensor) -> Range:
    return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)


def _absmax(w: Tensor) -> Range:
    low, high = _plain(w)
    m = torch.maximum(-low, high)
    return -m, m


def _steps(width: Tensor, count: int) -> Tensor:
    """width / count. By a Python number a GPU would multiply with its inverse, which is off by an ulp."""
    return width / width.new_full((), count)


def _full(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return _steps(high - low, (1 << bits) - 1)


def _half(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return _steps(high, (1 << bits - 1) - 1)


def _awq(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return _steps((high - low).clamp(min=1e-5), (1 << bits) - 1)


def _omni(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return _full(low, high, bits).clamp(1e-5, 1e4)


def _hqq(low: Tensor, high: Tensor, bits: int) -> Tensor:
    width = high - low
    inverse = (((1 << bits) - 1) / torch.where(width <= 1e-4, 1.0, width)).clamp(max=2e4)
    return 1 / torch.where(width <= 1e-4, 1.0, inverse)


def _smooth(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return _steps(high.clamp(min=1e-5), (1 << bits - 1) - 1)


GRIDS: dict[str, Grid] = {
    g.name: g
    for g in (
        Grid("g_asym", ZeroKind.CODE, _with_zero, _full),
        Grid("g_sym", ZeroKind.CONSTANT, _mirrored, _full),
        Grid("awq_asym", ZeroKind.CODE, _plain, _awq),
        Grid("omni", ZeroKind.INTEGER, _plain, _omni),
        Grid("q_sym", ZeroKind.CONSTANT, _absmax, _half),
        Grid("hqq", ZeroKind.FLOAT, _plain, _hqq),
        Grid("kivi", ZeroKind.MINIMUM, _plain, _full),
        Grid("absmax", ZeroKind.CONSTANT, _absmax, _smooth),
    )
}
ALIASES = {"absmax8": "absmax"}


def grid(name: str) -> Grid:
    """By name; case and hyphens do not matter (`G-asym`). Raises ValueError with the nearest names."""
    plain = name.lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in GRIDS:
        near = difflib.get_close_matches(plain, GRIDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"grid={name} is unknown; choose one of {', '.join(GRIDS)}{hint}")
    return GRIDS[plain]


def choose_grid(name: str | None, scheme: WeightScheme) -> tuple[Grid, list[str]]:
    """The grid for a scheme, and notes. None is g_sym or g_asym as the scheme says. A named symmetric grid serves both
    kinds of scheme; a named asymmetric grid gives way to g_sym in a symmetric scheme."""
    if name is None:
        return (GRIDS["g_sym"] if scheme.symmetric else GRIDS["g_asym"]), []
    chosen = grid(name)
    if scheme.symmetric and not chosen.symmetric:
        return GRIDS["g_sym"], [f"the scheme is symmetric: grid g_sym is used instead of {chosen.name}"]
    return chosen, []


def without_grid(name: str | None, mse: bool, scheme: WeightScheme) -> list[str]:
    """Notes on parameters that say nothing about the scheme's number format, which is none of integers."""
    given = [text for text, used in ((f"grid={name}", name is not None), ("mse=true", mse)) if used]
    return [f"without effect: {', '.join(given)}; weight.number={scheme.number} has values and scales of its own"] if given else []


def fit(g: Grid, w: Tensor, bits: int, scale_dtype: torch.dtype, mse: bool = False) -> Affine:
    """Scale and zero `[..., 1]` of values `[..., g]`, rounded to their stored type.

    Raises ScaleDtypeError when the stored type cannot hold them."""
    best = fit_unchecked(g, w, bits, scale_dtype, mse)
    check_stored(best, w, scale_dtype)
    return best


def fit_unchecked(g: Grid, w: Tensor, bits: int, scale_dtype: torch.dtype, mse: bool = False) -> Affine:
    """As `fit`, whether or not the stored type can hold them: `unfit_float16` tells."""
    low, high = g.limits(w)
    best = affine_of(g, low, high, bits, scale_dtype)
    if mse:
        least = _error(best, w)
        for i in range(1, MSE_STEPS):
            p = 1 - i / 100
            trial = affine_of(g, p * low, p * high, bits, scale_dtype)
            error = _error(trial, w)
            better = error < least
            least = torch.where(better, error, least)
            best = Affine(torch.where(better, trial.scale, best.scale), torch.where(better, trial.zero, best.zero), bits, g.zero)
    return best


def _error(affine: Affine, w: Tensor) -> Tensor:
    # A scale that the stored type rounds to 0 or infinity gives NaN here and is never better.
    return (affine.round(w) - w).abs().pow(MSE_POWER).sum(-1, keepdim=True)


def _rounded(value: Tensor, rounded: Tensor) -> Tensor:
    return rounded


def affine_of(
    g: Grid, low: Tensor, high: Tensor, bits: int, scale_dtype: torch.dtype, snap: Callable[[Tensor, Tensor], Tensor] = _rounded
) -> Affine:
    """Scale and zero of ranges. `snap(value, rounded)` returns `rounded`, or says what gradient that has (`quant.straight_through`)."""
    if g.zero is ZeroKind.INTEGER:
        # Equal values leave no range: without 0 in it, the least scale and the bound of the zero would shrink them to 0.1.
        equal = low == high
        low, high = torch.where(equal, low.clamp(max=0), low), torch.where(equal, high.clamp(min=0), high)
    # An all-zero group decodes to 0 whatever its scale; 1 is one that every type holds.
    exact = torch.where((low == 0) & (high == 0), 1.0, g.step(low, high, bits))
    scale = snap(exact, exact.to(scale_dtype).to(low.dtype))
    top = 2**bits - 1
    if g.zero is ZeroKind.CONSTANT:
        zero = torch.full_like(scale, 2 ** (bits - 1))
    elif g.zero is ZeroKind.CODE:
        zero = snap(-low / scale, (-low / scale).round()).clamp(0, top)
    elif g.zero is ZeroKind.INTEGER:
        ratio = (-low / scale).clamp(-1e4, 1e4)
        zero = snap(ratio, ratio.round())
    else:
        real = low if g.zero is ZeroKind.MINIMUM else -low / scale
        zero = snap(real, real.to(scale_dtype).to(low.dtype))
    return Affine(scale, zero, bits, g.zero)


def check_stored(affine: Affine, w: Tensor, scale_dtype: torch.dtype) -> None:
    """Raises ScaleDtypeError where the stored type cannot hold the ranges of values `[..., g]`: float32 holds all."""
    if scale_dtype is torch.float16:
        refuse_unfit(int(unfit_float16(affine, w).sum()), affine.scale.numel())


def refuse_unfit(wrong: int, of: int) -> None:
    """Raises ScaleDtypeError unless `wrong`, counted by `unfit_float16`, is 0."""
    if wrong:
        raise ScaleDtypeError(f"{wrong} of {of} scales or zeros do not fit float16")


def unfit_float16(affine: Affine, w: Tensor) -> Tensor:
    """Which groups: scales may be off by half a step over the whole range of codes, zeros by a quarter of a step."""
    scale, zero = affine.scale, affine.zero
    # Subnormal float16 values are 2^-24 apart.
    right = torch.isfinite(scale) & (scale >= 2.0 ** (affine.bits - 24))
    if affine.kind is ZeroKind.MINIMUM:
        right |= (scale == 0) & (w.amin(-1, keepdim=True) == w.amax(-1, keepdim=True))
        right &= torch.isfinite(zero) & ((zero.abs() <= 512 * scale) | (scale == 0))
    elif affine.kind is ZeroKind.FLOAT:
        right &= zero.abs() <= 512
    return ~right


T = TypeVar("T")


def with_stored_scales(scheme: WeightScheme, run: Callable[[torch.dtype], T]) -> tuple[T, list[str]]:
    """`run(scale_dtype)` with the scheme's type, or with float32 and a note when that type cannot hold the scales."""
    try:
        return run(DTYPES[scheme.scale_dtype]), []
    except ScaleDtypeError as e:
        return run(torch.float32), [f"{e}; scales are stored in float32"]


def round_weight(g: Grid, weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Fake-quantized `[N, K]`: what RTN on this grid stands for."""
    return round_groups(g, grouped(weight, scheme), scheme).view(weight.shape)


def round_groups(g: Grid, groups: Tensor, scheme: WeightScheme) -> Tensor:
    """As `round_weight`, of groups `[..., g]`."""
    rounded, _ = with_stored_scales(scheme, lambda dtype: fit(g, groups, scheme.bits, dtype).round(groups))
    return rounded
