"""SliM-LLM (Huang et al. 2024, arXiv 2405.14917): bits where the salient groups of columns are, ranges that suit them.

Objective: for a mean of N bits, the number p of groups with N - 1 and with N + 1 bits that changes the layer's output least (salience
decides which groups; `bit_allocation`); then min tr((W - Q) H (W - Q)ᵀ) column by column as in GPTQ, with the range of every group
searched within ±10 % for the least error Σ|w - ŵ|^2.4, salient weights counted `lam` times.
Shapes: weight `[N, K]`, Hessian `[K, K]`, samples `[S, T, K]`, G = K / group_size groups. Errors in squared output units, KL in nats.

`variant="reference"` is the reference code, quirks included: the 0.01 added to H for the allocation stays in H, so that no input
counts as dead; p = 0 is no candidate; the layer's bias is missing from the quantized output; groups of N - 1 bits before the first
wider group have the fixed zero 2^(b-1), but for saved bit lists; 1-bit groups have the scale mean |w| around mean w.
`variant="corrected"`: 0.01 for the allocation only, weights of dead inputs set to 0 before it, p = 0 .. G / 2, bias on both sides,
zeros of their own, scale mean |w - mean w|.
Departures, both variants: where the reference crashes (fewer than 4 groups; no salient weight in a group) all groups have N bits, or
all weights count alike; a constant 1-bit group has the scale 0 and is exact, and sign(0) is 1 elsewhere; the candidates' outputs are
summed group by group instead of computed anew, on the samples that calibrate keeps (16 sequences, 8,192 tokens at most); ties of
salience keep the column order; failed factorizations climb GPTQ's ladder.
In a symmetric scheme all groups of 2 bits and more use the grid g_sym; their zeros are stored all the same.
Float64 weights are computed in float64, all others in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind, group_width
from quant.factors import inverse_factor, revive_dead
from quant.grids import GRIDS, MSE_POWER, Grid, affine_of, check_stored, with_stored_scales
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.feedback import checked, damping_notes, without_dead
from quant.methods.slim_bits import binary, bit_allocation, check_binary, labelled, salience
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.solver import Solved, block_within, solve_columns
from quant.statistics import Statistics
from quant.tensors.mixed import MixedTensor

ABSOLUTE_DAMP = 0.01
"""Added to the diagonal of H for the bit allocation, whatever the scale of H."""
SHRINKS = [1 + i / 500 for i in range(51)] + [1 - i / 500 for i in range(1, 51)]
"""Factors of a range: 1, 1.002 .. 1.1, then 0.998 .. 0.9."""
MIDDLE = replace(GRIDS["g_asym"], name="slim_middle", zero=ZeroKind.CONSTANT)
"""The range of g_asym with the fixed zero of a symmetric grid."""


@dataclass(frozen=True)
class SlimLlm(Checked):
    name: ClassVar[str] = "slim_llm"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "samples"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(2, 3, 4, 5, 6, 7), granularity=("group",))

    objective: str = "kl"
    """What chooses p: kl (divergence of the softmax over outputs) or mse (of the outputs)."""
    variant: str = "reference"
    """reference or corrected, as above."""
    lam: float = 1.0
    """Weight of salient weights in the range search; 1 counts all alike."""
    sigma: float = 2.0
    """Salient weights lie more than so many standard deviations above their group's mean salience; read where lam is not 1."""
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal."""
    bit_lists: tuple[tuple[str, Any], ...] | None = None
    """Module ▸ bits of each group (`group_bits` of an earlier run), in place of the allocation; null searches."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ mixed codes. Raises NonFiniteError, SingularHessianError, and ValueError for shapes, schemes or bit lists that
        do not fit."""
        found = self.allocate(weight, statistics, scheme, linear)
        size, w = group_width(scheme, *weight.shape), found.weight

        def run(scale_dtype: torch.dtype) -> tuple[MixedTensor, Solved]:
            ranges = _Ranges(self, scheme, found.widths, size, scale_dtype, found.upper)
            solved = solve_columns(w.T.contiguous(), found.upper, block_within(size), ranges.round_column)
            return ranges.tensor(solved.codes), solved

        (tensor, solved), dtype_notes = with_stored_scales(scheme, run)
        details = {**found.details, "solver_loss": float(solved.loss.sum())}
        return Rounded(tensor, damp=found.damp, notes=[*found.notes, *solved.notes, *dtype_notes], details=details)

    def allocate(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Allocation:
        """Bits of every group of `[N, K]`, searched or as `bit_lists` has them. Raises as `quantize` does."""
        w, hessian = checked("slim_llm", weight, statistics)
        n, k = weight.shape
        reason = self.supports.refuses("slim_llm", scheme)
        if reason is not None:
            raise ValueError(reason)
        size = group_width(scheme, n, k)
        notes: list[str] = []
        corrected = self.variant == "corrected"

        h = hessian.to(w)
        if corrected:
            h, dead = revive_dead(h)
            w, zeros = without_dead(w, dead, int(dead.sum()))
            notes += zeros
        raised = h.clone()
        raised.diagonal().add_(ABSOLUTE_DAMP)
        upper, damp = inverse_factor(h if corrected else raised, self.damp)
        notes += damping_notes(self.damp, damp)

        if self.bit_lists is not None:
            widths = self._given(linear.name, k // size, scheme.bits)
        else:
            p, losses, why = bit_allocation(
                w, raised, statistics.samples, linear.bias, scheme.bits, size, self.objective, corrected=corrected
            )
            notes += why
            widths = labelled(salience(w, upper, size), p, scheme.bits)
        details: dict[str, Any] = {"group_bits": list(widths)}
        if self.bit_lists is None:
            details |= {"p": p, "allocation_loss": losses}
        return Allocation(widths, w, upper, damp, notes, details)

    def _given(self, name: str, groups: int, bits: int) -> tuple[int, ...]:
        lists: Mapping[str, Any] = dict(self.bit_lists or ())
        if name not in lists:
            raise ValueError(f"bit_lists has no list for {name}; it has {', '.join(list(lists)[:4]) or 'none'}; add it, or search (null)")
        found = tuple(lists[name])
        if len(found) != groups or any(type(b) is not int or abs(b - bits) > 1 for b in found):
            raise ValueError(f"bit_lists[{name}] is {found}; give {groups} whole numbers, each {bits - 1}, {bits} or {bits + 1}")
        return found


@dataclass(frozen=True)
class Allocation:
    """Bits of the groups of one linear, and what they were found with."""

    widths: tuple[int, ...]
    weight: Tensor
    """`[N, K]` in the type of work, columns of dead inputs set to 0 (variant=corrected)."""
    upper: Tensor
    """`[K, K]`, UᵀU = (H + d I)⁻¹."""
    damp: float
    notes: list[str]
    details: dict[str, Any]


class _Ranges:
    """Scale and zero of every group, fitted at its first column to weights that hold all earlier updates."""

    def __init__(
        self, method: SlimLlm, scheme: WeightScheme, widths: tuple[int, ...], size: int, scale_dtype: torch.dtype, upper: Tensor
    ) -> None:
        self.method, self.scheme, self.widths, self.size, self.scale_dtype = method, scheme, widths, size, scale_dtype
        self.u = upper.diagonal()
        first_wide = next((i for i, b in enumerate(widths) if b >= scheme.bits), len(widths))
        # With a saved list the reference makes every group asymmetric.
        fixed = method.variant == "reference" and method.bit_lists is None
        self.middle = range(first_wide) if fixed else range(0)
        """Groups with the fixed zero."""
        self.fitted: list[Affine] = []

    def round_column(self, j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if j % self.size == 0:
            self.fitted.append(self._fit(j // self.size, weights[j : j + self.size].T.contiguous()))
        a = self.fitted[j // self.size]
        if a.bits == 1:
            codes = (column >= a.zero).to(column)
            return codes, (2 * codes - 1) * a.scale + a.zero
        codes = a.encode(column)
        return codes, a.decode(codes)

    def _fit(self, group: int, w: Tensor) -> Affine:
        """w `[N, g]` ▸ scale and zero `[N]`; the mean as zero of a 1-bit group."""
        bits = self.widths[group]
        if bits == 1:
            scale, mean = binary(w, centred=self.method.variant == "corrected")
            stored = Affine(scale.to(self.scale_dtype).to(w), mean.to(self.scale_dtype).to(w), 1, ZeroKind.MINIMUM)
            check_binary(scale, mean, stored.scale, stored.zero)
            return stored
        grid = GRIDS["g_sym"] if self.scheme.symmetric else MIDDLE if group in self.middle else GRIDS["g_asym"]
        best = self._search(grid, w, bits, self._importance(group, w))
        check_stored(best, w, self.scale_dtype)
        return Affine(best.scale[:, 0], best.zero[:, 0], bits, ZeroKind.CODE)

    def _importance(self, group: int, w: Tensor) -> Tensor | None:
        if self.method.lam == 1:
            return None
        s = (w / self.u[group * self.size : (group + 1) * self.size]).square()
        # The reference finds outliers of either sign, then all weights at least as salient as the least of them.
        outliers = s[(s - s.mean()).abs() > self.method.sigma * s.std()]
        return torch.where(s >= outliers.min(), self.method.lam, 1.0) if outliers.numel() else None

    def _search(self, grid: Grid, w: Tensor, bits: int, importance: Tensor | None) -> Affine:
        low, high = grid.limits(w)
        best, least = affine_of(grid, low, high, bits, self.scale_dtype), w.new_full((w.shape[0], 1), float("inf"))
        shares = torch.tensor(SHRINKS, dtype=w.dtype, device=w.device)[:, None, None]
        trials = affine_of(grid, shares * low, shares * high, bits, self.scale_dtype)
        for scale, zero in zip(trials.scale, trials.zero, strict=True):
            trial = Affine(scale, zero, bits, trials.kind)
            error = (trial.round(w) - w).abs().pow(MSE_POWER)
            error = (error if importance is None else error * importance).sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = Affine(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero), bits, best.kind)
        return best

    def tensor(self, codes: Tensor) -> MixedTensor:
        """From the solver's codes `[K, N]`."""
        scale, zero = (torch.stack([getattr(a, part) for a in self.fitted], dim=1) for part in ("scale", "zero"))
        ones = torch.tensor([b == 1 for b in self.widths], device=zero.device)
        return MixedTensor(
            codes=codes.T.contiguous(),
            scale=scale.to(self.scale_dtype).contiguous(),
            zero=zero.masked_fill(ones, 0).to(torch.uint8).contiguous(),
            mean=zero[:, ones].to(self.scale_dtype).contiguous(),
            widths=self.widths,
            base=self.scheme.bits,
        )
