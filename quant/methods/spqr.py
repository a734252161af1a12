"""SpQR (Dettmers et al. 2023, arXiv 2306.03078): small groups with statistics that are quantized too, outliers kept as they are.

Objective: min tr((W - Q) H (W - Q)ᵀ) column by column as in GPTQ, on a grid that need not hold 0. With U the factor of (H + damp)⁻¹:
  τ = outlier_threshold · mean_j(var_i(w_ij) / U_jj²)
  suspects of a group: weights without which (and with the range of the others) the group's error Σ (w - ŵ)² / U_jj² falls by more than
  τ; the range is fitted with the mean of the others in their place, to weights that hold all earlier updates
  scale and zero of a group: codes on a grid per `stat_rows` consecutive rows
  outliers: weights with (w - ŵ)² / U_jj² > τ, kept
Shapes: weight `[N, K]`, Hessian `[K, K]`; threshold relative, without unit. Defaults are those of the recommended command (3 bits, 16
columns per group); an infinite threshold (a large number in yaml) keeps no outlier.
Departures: an all-zero group has the scale 0 and stays 0 (the reference takes [-1, 1], whose grid has no 0), a constant one the scale
|w|; `stat_rows` need not divide the rows; with `round_zero` ranges hold 0, so that the zero is one of its 2^b codes; the variance of a
single row is taken over its columns, of a single weight around 0; inputs that are all 0 (H = 0) count as H = I; failed
factorizations climb GPTQ's ladder on top of `damp`. A symmetric scheme is not what SpQR makes: zeros are stored all the same, and it is
noted.
Float64 weights are computed in float64, all others in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import group_width
from quant.errors import ScaleDtypeError
from quant.factors import inverse_factor
from quant.grids import with_stored_scales
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.feedback import checked, without_dead
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.solver import Solved, block_within, solve_columns
from quant.statistics import Statistics
from quant.tensors.packing import narrowest
from quant.tensors.sparse import SparseTensor, TwoLevel, joined


@dataclass(frozen=True)
class Spqr(Checked):
    name: ClassVar[str] = "spqr"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(granularity=("channel", "group"))

    outlier_threshold: float = 0.2
    """Relative: times the mean over columns of var(w) / U_jj²."""
    scale_bits: int = 3
    """Of the codes of scales."""
    zero_bits: int = 3
    """Of the codes of zeros; not read with round_zero."""
    stat_rows: int = 16
    """Consecutive rows whose scales, and zeros, share a grid."""
    round_zero: bool = False
    """Zeros are codes of the weight's own width, and ranges hold 0."""
    act_order: bool = True
    """Columns by decreasing diagonal of H; groups of permuted columns store each column's group."""
    damp: float = 1.0
    """Fraction of mean(diag H) added to the diagonal, before dead inputs get H_jj = 1."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ sparse codes. Raises NonFiniteError, SingularHessianError, and ValueError for shapes or schemes that do not fit."""
        w, hessian = checked("spqr", weight, statistics)
        n, k = weight.shape
        reason = self.supports.refuses("spqr", scheme)
        if reason is not None:
            raise ValueError(reason)
        size = group_width(scheme, n, k)
        notes = ["spqr stores zeros in a symmetric scheme too"] if scheme.symmetric else []

        h = hessian.to(w, copy=True)
        dead = h.diagonal() == 0
        h.diagonal().add_(self.damp * h.diagonal().abs().mean())
        h.diagonal()[dead] = 1
        w, zeros = without_dead(w, dead, int(dead.sum()))
        notes += zeros
        order = torch.argsort(h.diagonal(), descending=True, stable=True) if self.act_order else torch.arange(k, device=w.device)
        upper, more = inverse_factor(h[order][:, order], 0.0)
        if more:
            notes.append(f"damping {self.damp:g} did not make the Hessian positive definite: {more:g} more was used")
        columns = w.T[order]
        threshold = self._threshold(columns, upper.diagonal())

        def run(scale_dtype: torch.dtype) -> tuple[SparseTensor, Solved]:
            groups = _Groups(self, scheme.bits, size, scale_dtype, upper.diagonal(), threshold)
            # Groups begin where blocks do: ranges see the updates of all columns before.
            solved = solve_columns(columns, upper, block_within(size), groups.round_column)
            return groups.tensor(solved.codes, order if self.act_order else None), solved

        (tensor, solved), dtype_notes = with_stored_scales(scheme, run)
        details = {
            "outlier_share": tensor.outlier_share,
            "threshold": None if math.isinf(threshold) else threshold,
            "solver_loss": float(solved.loss.sum()),
        }
        return Rounded(tensor, damp=self.damp + more, notes=[*notes, *solved.notes, *dtype_notes], details=details)

    def _threshold(self, columns: Tensor, u: Tensor) -> float:
        """τ of columns `[K, N]`."""
        k, n = columns.shape
        if math.isinf(self.outlier_threshold):
            return math.inf
        spread = columns.var(1) if n > 1 else (columns.var() if k > 1 else columns.square().mean()).expand(k)
        return self.outlier_threshold * float((spread / u.square()).mean())


@dataclass(frozen=True)
class _Range:
    """Scale and zero `[N, 1]`, on their way to storage or back."""

    scale: Tensor
    zero: Tensor
    bits: int

    @staticmethod
    def of(low: Tensor, high: Tensor, bits: int, round_zero: bool) -> _Range:
        if round_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = torch.where(high > low, (high - low) / (2**bits - 1), low.abs())
        zero = torch.where(scale > 0, -low / torch.where(scale > 0, scale, 1.0), 0.0)
        return _Range(scale, zero.round().clamp(0, 2**bits - 1) if round_zero else zero, bits)

    def encode(self, w: Tensor) -> Tensor:
        steps = torch.where(self.scale > 0, w / torch.where(self.scale > 0, self.scale, 1.0), 0.0)
        return (steps + self.zero).round().clamp(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes - self.zero) * self.scale


def suspects(w: Tensor, u: Tensor, bits: int, threshold: float, round_zero: bool = False) -> Tensor:
    """Mask `[N, g]` of weights `[N, g]` whose leaving out improves the group's error Σ (w - ŵ)² / u² by more than `threshold`.

    Only the least and the greatest weight set the range, so three ranges per group say all."""
    if w.shape[1] == 1:
        return torch.zeros_like(w, dtype=torch.bool)
    ends, at = w.sort(1)
    low, high = ends[:, :1], ends[:, -1:]

    def errors(low: Tensor, high: Tensor) -> Tensor:
        a = _Range.of(low, high, bits, round_zero)
        return ((a.decode(a.encode(w)) - w) / u).square()

    full = errors(low, high)
    total = full.sum(1, keepdim=True)
    gain = full.clone()  # leaving out a weight between the ends saves its own error
    for column, rest in ((at[:, :1], errors(ends[:, 1:2], high)), (at[:, -1:], errors(low, ends[:, -2:-1]))):
        gain.scatter_(1, column, total - (rest.sum(1, keepdim=True) - rest.gather(1, column)))
    return gain > threshold


class _Groups:
    """Fits a group at its first column; remembers outliers. Works in the solver's order of columns."""

    def __init__(self, method: Spqr, bits: int, size: int, scale_dtype: torch.dtype, u: Tensor, threshold: float) -> None:
        self.method, self.bits, self.size, self.scale_dtype, self.u, self.threshold = method, bits, size, scale_dtype, u, threshold
        self.diagonal: list[float] = u.tolist()
        self.scales: list[TwoLevel] = []
        self.zeros: list[TwoLevel] = []
        self.plain_zeros: list[Tensor] = []
        self.outliers: list[Tensor] = []
        self.values: list[Tensor] = []

    def round_column(self, j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if j % self.size == 0:
            self._fit(weights[j : j + self.size].T.contiguous(), self.u[j : j + self.size])
        codes = self.range.encode(column[:, None])[:, 0]
        q = self.range.decode(codes[:, None])[:, 0]
        outlier = ((column - q) / self.diagonal[j]).square() > self.threshold
        kept = column.to(self.scale_dtype)
        if not bool(torch.isfinite(kept[outlier]).all()):
            raise ScaleDtypeError(f"outliers of column {j} do not fit {str(self.scale_dtype).split('.')[1]}")
        self.outliers.append(outlier)
        self.values.append(kept)
        return codes, torch.where(outlier, kept.to(column), q)

    def _fit(self, w: Tensor, u: Tensor) -> None:
        m = self.method
        if not math.isinf(self.threshold):
            mask = suspects(w, u, self.bits, self.threshold, m.round_zero)
            others = (~mask).sum(1, keepdim=True).clamp(min=1)
            w = torch.where(mask, w.masked_fill(mask, 0).sum(1, keepdim=True) / others, w)
        fitted = _Range.of(w.amin(1, keepdim=True), w.amax(1, keepdim=True), self.bits, m.round_zero)
        scale = TwoLevel.fit(fitted.scale, m.scale_bits, m.stat_rows, self.scale_dtype)
        self.scales.append(scale)
        zero = fitted.zero
        if m.round_zero:
            self.plain_zeros.append(zero)
        else:
            self.zeros.append(TwoLevel.fit(zero, m.zero_bits, m.stat_rows, self.scale_dtype))
            zero = self.zeros[-1].values(w.dtype)
        self.range = _Range(scale.values(w.dtype), zero, self.bits)

    def tensor(self, codes: Tensor, order: Tensor | None) -> SparseTensor:
        """From the solver's codes `[K, N]`; order `[K]` where columns were permuted."""
        mask, values = torch.stack(self.outliers, 1), torch.stack(self.values, 1)
        codes, index = codes.T, None
        if order is not None:
            back = torch.argsort(order)
            codes, mask, values = codes[:, back], mask[:, back], values[:, back]
            if len(self.scales) > 1:
                index = (back // self.size).to(narrowest(len(self.scales) - 1))
        zero = torch.cat(self.plain_zeros, 1).to(torch.uint8) if self.method.round_zero else joined(self.zeros)
        rows, columns = mask.nonzero(as_tuple=True)
        return SparseTensor(codes.contiguous(), self.bits, joined(self.scales), zero, rows, columns, values[mask], index)
