"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): least output error on calibration data, column by column.

Objective: min tr((W - Q) H (W - Q)ᵀ), H = (2 / sequences) Σ x xᵀ. Shapes: weight `[N, K]`, Hessian `[K, K]`.
The behaviour is the reference code's, quirks included: per-row ranges are taken from the weight before dead columns are
zeroed; columns are ordered before damping, dead ones counting as H_jj = 1; the ranges of dynamic groups are taken from
weights that hold the updates of finished blocks only, so that `block_size` matters with groups. Act-order with dynamic
groups makes groups of permuted columns and stores each column's group. With `outlier_columns` (0 is plain GPTQ) it is the rounding of OWQ
(arXiv 2306.02272) and QUIK (arXiv 2310.09259): the columns that cost most stay in float16; QUIK's inputs there do so at run time too.
Number formats of the scheme other than integers have static scales, those of the weight as given: only each code is chosen with
the error of the columns before it: as with `static_groups`, whatever that says. `grid` and `mse` then say nothing, which is noted.
Departures: ties in the order keep the column order; inputs that are all 0 (H = 0) count as H = I instead of
zeroing the weight; a failed factorization climbs a ladder of damping; one Cholesky factorization instead of three
steps (the same U). Float64 weights are computed in float64, all others in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, grouped
from quant.factors import inverse_factor, pull_factor, revive_dead
from quant.grids import DTYPES, choose_grid, fit, with_stored_scales, without_grid
from quant.kernels import kernel
from quant.kernels.gptq_block import KINDS
from quant.methods import gptq_ranges
from quant.methods.base import ANY, Linear, Rounded, StoredTensor
from quant.methods.feedback import checked, checked_together, damping_notes, without_dead
from quant.number_formats import encode, number_format
from quant.outliers import outlier_columns
from quant.parameters import Checked, refuses_scheme
from quant.scheme import ANY_NUMBER, Granularity, Supports, WeightScheme
from quant.solver import Solved, by_columns, by_rows, solve_affine, solve_columns, stacks
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from quant.tensors.columns import ColumnsTensor
from quant.tensors.floating import FloatingTensor


@dataclass(frozen=True)
class _Factor:
    """Of a damped Hessian."""

    order: Tensor
    """`[K]`: of the columns."""
    upper: Tensor
    """`[K, K]`: of columns in that order, U, or P of spans."""
    span: int | None
    """As `solve_affine` has it."""
    damp: float


@dataclass(frozen=True)
class Gptq(Checked):
    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(numbers=ANY_NUMBER)
    optional: ClassVar[frozenset[str]] = frozenset({"outlier_columns", "outlier_metric"})
    """Parameters that a yaml may leave out where it means their default: they came later, and the keys of finished work stay."""

    grid: str | None = None
    """A name of `quant.grids`; None is g_sym or g_asym as the scheme says."""
    mse: bool = False
    """Search the range of least error instead of taking the whole range."""
    act_order: bool = False
    """Columns by decreasing diagonal of H."""
    static_groups: bool = False
    """Ranges of groups from the weight as given, in the plain column order."""
    block_size: int = 128
    """Columns between updates of all later columns."""
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal."""
    true_sequential: bool = False
    """Read by the block loop, not here: with propagation=quantized, linears also see the quantized ones before them."""
    outlier_columns: int = 0
    """Columns kept in float16, solved last so that they take up the errors of the others; ranges leave them out (OWQ, QUIK)."""
    outlier_metric: str = "owq"
    """Which columns those are (`quant.outliers`): owq or quik."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ affine codes, and the columns kept in float16 (`outlier_columns`) beside them.

        Raises NonFiniteError, SingularHessianError, and ValueError for shapes that do not fit."""
        w, hessian = checked("gptq", weight, statistics)
        h, dead = revive_dead(hessian)
        given = self._given([w], scheme, dead, int(dead.sum()))
        reason = refuses_scheme(self.name, {"outlier_columns": self.outlier_columns}, scheme)
        if reason is not None:
            raise ValueError(reason)
        kept = self._kept_columns(given, hessian.diagonal())
        factor = self._factor(h, kept, [given])

        def run(scale_dtype: torch.dtype) -> StoredTensor:
            columns = self._ordered(given.weight, factor.order, kept.numel())
            solved, [rest] = self._solve([given], columns, factor, kept.numel(), [scale_dtype])
            if not kept.numel():
                return rest
            return ColumnsTensor(rest, kept, _kept_values(columns, solved.values, factor.upper), exact_inputs=self.outlier_metric == "quik")

        def run_floating(scale_dtype: torch.dtype) -> FloatingTensor:
            floating, more = _solve_floating(given.weight, given.groups, factor, scheme, scale_dtype, self.block_size)
            given.notes.extend(n for n in more if n not in given.notes)
            return floating

        make: Callable[[torch.dtype], StoredTensor] = run if scheme.number == "int" else run_floating
        tensor, dtype_notes = with_stored_scales(scheme, make)
        details = {"kept_columns": kept.tolist()} if kept.numel() else {}
        if isinstance(tensor, ColumnsTensor) and tensor.kept_values.dtype is torch.float32:
            given.notes.append("float16 does not hold the kept columns: they are stored in float32")
        return Rounded(tensor, damp=factor.damp, notes=given.notes + dtype_notes, details=details)

    def stacks(self, weights: Sequence[Tensor], schemes: Sequence[WeightScheme]) -> bool:
        """Where all have integer codes, one order (which columns are kept differs from weight to weight), one kind of zero, and ranges that
        all look ahead or none does. Bits and groups may differ."""
        alike = {(KINDS.get(choose_grid(self.grid, s)[0].zero, 0), self.looks_ahead(s)) for s in schemes}
        return not self.outlier_columns and all(s.number == "int" for s in schemes) and len(alike) == 1 and stacks(weights)

    def quantize_stacked(self, weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[WeightScheme]) -> list[Rounded]:
        """As `quantize` has it for each; raises ScaleDtypeError too."""
        # On a GPU, weights are read as they are: where they are laid out by columns they become float32.
        known = self.static_groups or all(s.granularity is not Granularity.GROUP for s in schemes)
        lean = known and gptq_ranges.on_gpu(weights[0]) and weights[0].dtype is not torch.float64 and not self.act_order and not self.mse
        ready, hessian = checked_together("gptq", weights, statistics, as_given=lean)
        dead = hessian.diagonal() == 0
        zeroed = int(dead.sum())
        h = revive_dead(hessian)[0] if zeroed else hessian
        # Ranges of neighbours with one scheme are found together.
        runs: list[tuple[WeightScheme, list[Tensor]]] = []
        for w, scheme in zip(ready, schemes, strict=True):
            if runs and runs[-1][0] == scheme and scheme.granularity is not Granularity.TENSOR:
                runs[-1][1].append(w)
            else:
                runs.append((scheme, [w]))
        givens = [self._given(own, scheme, dead, zeroed) for scheme, own in runs]
        factor = self._factor(h, torch.empty(0, dtype=torch.int64, device=h.device), givens)
        parts = [g.weight if lean else self._ordered(g.weight, factor.order) for g in givens]
        columns = by_columns(parts) if lean else torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        _, tensors = self._solve(givens, columns, factor, 0, [DTYPES[g.scheme.scale_dtype] for g in givens], lean)
        notes = [g.notes for g in givens for _ in g.rows]
        return [Rounded(t, damp=factor.damp, notes=list(own)) for t, own in zip(tensors, notes, strict=True)]

    def _given(self, weights: list[Tensor], scheme: WeightScheme, dead: Tensor, zeroed: int) -> gptq_ranges.Given:
        """zeroed: how many inputs are dead."""
        w = torch.cat(weights) if len(weights) > 1 else weights[0]
        chosen, notes = choose_grid(self.grid, scheme)
        if scheme.number != "int":
            notes = without_grid(self.grid, self.mse, scheme)
        live, zeros = without_dead(w, dead, zeroed)
        return gptq_ranges.Given(live, [len(own) for own in weights], grouped(w, scheme), scheme, chosen, notes + zeros)

    def looks_ahead(self, scheme: WeightScheme, kept: int = 0) -> bool:
        """Whether ranges go by weights beyond the block at work: of groups that blocks do not hold whole, or beside kept columns."""
        dynamic = scheme.granularity is Granularity.GROUP and not self.static_groups
        return dynamic and (kept > 0 or self.block_size % (scheme.group_size or 1) != 0)

    def _factor(self, h: Tensor, kept: Tensor, givens: list[gptq_ranges.Given]) -> _Factor:
        order = torch.argsort(h.diagonal(), descending=True, stable=True) if self.act_order else torch.arange(len(h), device=h.device)
        # Last, so that they take up the errors of all others and add none but that of float16.
        if kept.numel():
            order = torch.cat([order[~torch.isin(order, kept)], kept])
        hessian = h[order][:, order] if self.reorders(kept.numel()) else h
        span = None
        # Of kept columns U tells what they take up, and codes of number formats are solved by it.
        if not kept.numel() and all(g.scheme.number == "int" and not self.looks_ahead(g.scheme) for g in givens):
            span = kernel("lazy_update", device=h.device, later=h).run.span(self.block_size, h.device)
        upper, damp = inverse_factor(hessian, self.damp) if span is None else pull_factor(hessian, self.damp, span)
        for given in givens:
            given.notes.extend(damping_notes(self.damp, damp))
        return _Factor(order, upper, span, damp)

    def reorders(self, kept: int) -> bool:
        """Whether columns are solved in another order than they lie."""
        return self.act_order or kept > 0

    def _ordered(self, weight: Tensor, order: Tensor, kept: int = 0) -> Tensor:
        """`[N, K]` ▸ its columns `[K, N]` in order; a view where that is theirs."""
        return weight.T[order] if self.reorders(kept) else weight.T

    def _solve(
        self,
        givens: list[gptq_ranges.Given],
        columns: Tensor,
        factor: _Factor,
        kept: int,
        scale_dtypes: list[torch.dtype],
        spends: bool = False,
    ) -> tuple[Solved, list[AffineTensor]]:
        """Of the weights' columns `[K, N]` in order, all but the last `kept`; and the codes of each weight. spends: see `solve_affine`."""
        coded, order = len(columns) - kept, factor.order
        stack = [n for g in givens for n in g.rows]

        def solve(in_launch: bool) -> tuple[list[gptq_ranges.Ranges], Solved, bool]:
            own = [gptq_ranges.Ranges(self, g, dtype, order, kept, in_launch) for g, dtype in zip(givens, scale_dtypes, strict=True)]
            rows = gptq_ranges.StackedRanges(own)
            made = solve_affine(
                columns[:coded],
                factor.upper[:coded, :coded],
                self.block_size,
                rows.block,
                stack=stack,
                fits=rows.fits,
                spends=spends,
                looks_ahead=any(self.looks_ahead(g.scheme, kept) for g in givens),
                span=factor.span,
            )
            return own, made, rows.odd()

        ranges, solved, odd = solve(in_launch=True)
        if odd:  # as torch has it, which says so where scales do not fit their type
            ranges, solved, _ = solve(in_launch=False)
        plain = solved.codes
        if self.reorders(kept):
            plain = torch.zeros_like(columns, dtype=torch.uint8)
            plain[order[:coded]] = solved.codes
        tensors = []
        codes = iter(by_rows(plain, stack))
        for given, own, dtype in zip(givens, ranges, scale_dtypes, strict=True):
            given.notes.extend(n for n in solved.notes if n not in given.notes)
            affine, index = own.affine(), own.group_of_column()
            scales, zeros = (torch.split(t, given.rows) if len(given.rows) > 1 else (t,) for t in (affine.scale, affine.zero))
            for scale, zero in zip(scales, zeros, strict=True):
                tensors.append(AffineTensor.build(next(codes), Affine(scale, zero, affine.bits, affine.kind), dtype, g_idx=index))
        return solved, tensors

    def _kept_columns(self, given: gptq_ranges.Given, diagonal: Tensor) -> Tensor:
        w, groups, scheme = given.weight, given.groups, given.scheme
        if not self.outlier_columns:
            return torch.empty(0, dtype=torch.int64, device=w.device)
        width = groups.shape[2] if scheme.granularity is Granularity.GROUP else w.shape[1]

        def rounded(source: Tensor) -> Tensor:
            affine = fit(given.chosen, source.view(groups.shape), scheme.bits, torch.float32)
            return affine.round(groups).view(w.shape)

        return outlier_columns(self.outlier_metric, w, diagonal, self.outlier_columns, width, rounded)


def _solve_floating(
    w: Tensor, groups: Tensor, factor: _Factor, scheme: WeightScheme, scale_dtype: torch.dtype, block_size: int
) -> tuple[FloatingTensor, list[str]]:
    """Codes of a number format with scales `[R, G]` of the weight as given; and the solver's notes."""
    format, order = number_format(scheme.number), factor.order
    scales = format.fit(groups.abs().amax(-1), scale_dtype)
    per_group = format.read(scales)
    columns = per_group.repeat_interleave(w.shape[1] // per_group.shape[1], dim=1).T[order]
    values = format.element.values().to(w)

    def round_column(j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        codes = encode(format, column, columns[j])
        return codes, values[codes] * columns[j].to(w)

    solved = solve_columns(w.T[order], factor.upper, block_size, round_column)
    plain = torch.empty_like(solved.codes)
    plain[order] = solved.codes
    return FloatingTensor(plain.T.contiguous(), scales, scheme.number), solved.notes


def _kept_values(columns: Tensor, values: Tensor, upper: Tensor) -> Tensor:
    """`[N, r]`: the last r of columns `[K, N]`, with the errors of the others, rounded to values `[K - r, N]`, spread over them; float16,
    or float32 where float16 cannot hold them."""
    coded = values.shape[0]
    # W - Q = E U, with U upper triangular.
    errors = torch.linalg.solve_triangular(upper[:coded, :coded].T, columns[:coded] - values, upper=False)
    rest = columns[coded:] - upper[:coded, coded:].T @ errors
    half = rest.half().to(rest)
    # Twice float16's own precision, which values below its normal ones miss.
    fits = ((half - rest).abs() <= 2.0**-10 * rest.abs().amax(1, keepdim=True)).all()
    dtype = torch.float16 if bool(fits) else torch.float32

    def keep(j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(column), column.to(dtype).to(column)

    return solve_columns(rest, upper[coded:, coded:], len(rest), keep).values.T.to(dtype).contiguous()
