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

from quant.affine import Affine, group_of_each, grouped
from quant.factors import inverse_factor, revive_dead
from quant.grids import DTYPES, Grid, choose_grid, fit, with_stored_scales, without_grid
from quant.kernels import ran
from quant.kernels.gptq_block import KINDS, Fit, Fits, stacked
from quant.methods.base import ANY, Linear, Rounded, StoredTensor, working_dtype
from quant.methods.feedback import checked, checked_together, damping_notes, without_dead
from quant.number_formats import encode, number_format
from quant.outliers import outlier_columns, without_columns
from quant.parameters import check, refuses_scheme
from quant.scheme import ANY_NUMBER, Granularity, Supports, WeightScheme
from quant.solver import Solved, by_columns, by_rows, solve_affine, solve_columns, stacks
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from quant.tensors.columns import ColumnsTensor
from quant.tensors.floating import FloatingTensor


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


@dataclass
class _Given:
    """Weights of one scheme, one after another along rows."""

    weight: Tensor
    """`[N, K]`, dead inputs' columns 0."""
    rows: list[int]
    """Of each of the weights."""
    groups: Tensor
    """`[N, G, g]` of the weights as given: ranges of whole rows are taken before dead inputs are zeroed."""
    scheme: WeightScheme
    chosen: Grid
    notes: list[str]

    def groups_to_fit(self) -> Tensor:
        return grouped(self.weight, self.scheme) if self.scheme.granularity is Granularity.GROUP else self.groups


@dataclass(frozen=True)
class Gptq:
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

    def __post_init__(self) -> None:
        check(self)

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
        order, upper, damp = self._factor(h, kept, [given])

        def run(scale_dtype: torch.dtype) -> StoredTensor:
            columns = self._ordered(given.weight, order, kept.numel())
            solved, [rest] = self._solve([given], columns, upper, order, kept.numel(), [scale_dtype])
            if not kept.numel():
                return rest
            return ColumnsTensor(rest, kept, _kept_values(columns, solved.values, upper), exact_inputs=self.outlier_metric == "quik")

        def run_floating(scale_dtype: torch.dtype) -> FloatingTensor:
            floating, more = _solve_floating(given.weight, given.groups, upper, order, scheme, scale_dtype, self.block_size)
            given.notes.extend(n for n in more if n not in given.notes)
            return floating

        make: Callable[[torch.dtype], StoredTensor] = run if scheme.number == "int" else run_floating
        tensor, dtype_notes = with_stored_scales(scheme, make)
        details = {"kept_columns": kept.tolist()} if kept.numel() else {}
        if isinstance(tensor, ColumnsTensor) and tensor.kept_values.dtype is torch.float32:
            given.notes.append("float16 does not hold the kept columns: they are stored in float32")
        return Rounded(tensor, damp=damp, notes=given.notes + dtype_notes, details=details)

    def stacks(self, weights: Sequence[Tensor], schemes: Sequence[WeightScheme]) -> bool:
        """Where all have integer codes, one order (which columns are kept differs from weight to weight) and one kind of zero. Bits and
        groups may differ."""
        kinds = {KINDS.get(choose_grid(self.grid, s)[0].zero, 0) for s in schemes}
        return not self.outlier_columns and all(s.number == "int" for s in schemes) and len(kinds) == 1 and stacks(weights)

    def quantize_stacked(self, weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[WeightScheme]) -> list[Rounded]:
        """As `quantize` has it for each; raises ScaleDtypeError too."""
        # On a GPU, weights are read as they are: where they are laid out by columns they become float32.
        known = self.static_groups or all(s.granularity is not Granularity.GROUP for s in schemes)
        lean = known and _on_gpu(weights[0]) and weights[0].dtype is not torch.float64 and not self.act_order and not self.mse
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
        order, upper, damp = self._factor(h, torch.empty(0, dtype=torch.int64, device=h.device), givens)
        parts = [g.weight if lean else self._ordered(g.weight, order) for g in givens]
        columns = by_columns(parts) if lean else torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        _, tensors = self._solve(givens, columns, upper, order, 0, [DTYPES[g.scheme.scale_dtype] for g in givens], lean)
        notes = [g.notes for g in givens for _ in g.rows]
        return [Rounded(t, damp=damp, notes=list(own)) for t, own in zip(tensors, notes, strict=True)]

    def _given(self, weights: list[Tensor], scheme: WeightScheme, dead: Tensor, zeroed: int) -> _Given:
        """zeroed: how many inputs are dead."""
        w = torch.cat(weights) if len(weights) > 1 else weights[0]
        chosen, notes = choose_grid(self.grid, scheme)
        if scheme.number != "int":
            notes = without_grid(self.grid, self.mse, scheme)
        live, zeros = without_dead(w, dead, zeroed)
        return _Given(live, [len(own) for own in weights], grouped(w, scheme), scheme, chosen, notes + zeros)

    def _factor(self, h: Tensor, kept: Tensor, givens: list[_Given]) -> tuple[Tensor, Tensor, float]:
        """Order of the columns, U in it, and the damping."""
        order = torch.argsort(h.diagonal(), descending=True, stable=True) if self.act_order else torch.arange(len(h), device=h.device)
        # Last, so that they take up the errors of all others and add none but that of float16.
        if kept.numel():
            order = torch.cat([order[~torch.isin(order, kept)], kept])
        upper, damp = inverse_factor(h[order][:, order] if self._reorders(kept.numel()) else h, self.damp)
        for given in givens:
            given.notes.extend(damping_notes(self.damp, damp))
        return order, upper, damp

    def _reorders(self, kept: int) -> bool:
        """Whether columns are solved in another order than they lie."""
        return self.act_order or kept > 0

    def _ordered(self, weight: Tensor, order: Tensor, kept: int = 0) -> Tensor:
        """`[N, K]` ▸ its columns `[K, N]` in order; a view where that is theirs."""
        return weight.T[order] if self._reorders(kept) else weight.T

    def _solve(
        self,
        givens: list[_Given],
        columns: Tensor,
        upper: Tensor,
        order: Tensor,
        kept: int,
        scale_dtypes: list[torch.dtype],
        spends: bool = False,
    ) -> tuple[Solved, list[AffineTensor]]:
        """Of the weights' columns `[K, N]` in order, all but the last `kept`; and the codes of each weight. spends: see `solve_affine`."""
        coded = len(columns) - kept
        stack = [n for g in givens for n in g.rows]

        def solve(in_launch: bool) -> tuple[list[_Ranges], Solved, bool]:
            own = [_Ranges(self, g, dtype, order, kept, in_launch) for g, dtype in zip(givens, scale_dtypes, strict=True)]
            rows = _StackedRanges(own)
            given, ahead = (columns[:coded], upper[:coded, :coded]), any(r.looks_ahead for r in own)
            made = solve_affine(*given, self.block_size, rows.block, "auto", stack, rows.fits, spends, ahead)
            return own, made, rows.odd()

        ranges, solved, odd = solve(in_launch=True)
        if odd:  # as torch has it, which says so where scales do not fit their type
            ranges, solved, _ = solve(in_launch=False)
        plain = solved.codes
        if self._reorders(kept):
            plain = torch.zeros_like(columns)
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

    def _kept_columns(self, given: _Given, diagonal: Tensor) -> Tensor:
        w, groups, scheme = given.weight, given.groups, given.scheme
        if not self.outlier_columns:
            return torch.empty(0, dtype=torch.int64, device=w.device)
        width = groups.shape[2] if scheme.granularity is Granularity.GROUP else w.shape[1]

        def rounded(source: Tensor) -> Tensor:
            affine = fit(given.chosen, source.view(groups.shape), scheme.bits, torch.float32)
            return affine.round(groups).view(w.shape)

        return outlier_columns(self.outlier_metric, w, diagonal, self.outlier_columns, width, rounded)


def _solve_floating(
    w: Tensor, groups: Tensor, upper: Tensor, order: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, block_size: int
) -> tuple[FloatingTensor, list[str]]:
    """Codes of a number format with scales `[R, G]` of the weight as given; and the solver's notes."""
    format = number_format(scheme.number)
    scales = format.fit(groups.abs().amax(-1), scale_dtype)
    per_group = format.read(scales)
    columns = per_group.repeat_interleave(w.shape[1] // per_group.shape[1], dim=1).T[order]
    values = format.element.values().to(w)

    def round_column(j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        codes = encode(format, column, columns[j])
        return codes.to(w), values[codes] * columns[j].to(w)

    solved = solve_columns(w.T[order], upper, block_size, round_column)
    plain = torch.empty_like(solved.codes)
    plain[order] = solved.codes
    return FloatingTensor(plain.T.to(torch.uint8).contiguous(), scales, scheme.number), solved.notes


class _Ranges:
    """Scale and zero of every group of some rows: known before the solver starts (per row, per tensor, static), or found on the way: by the
    launch that solves a group's block where it can, elsewhere by torch before the block that the group begins in."""

    def __init__(self, method: Gptq, given: _Given, scale_dtype: torch.dtype, order: Tensor, kept: int, in_launch: bool) -> None:
        scheme, groups, w = given.scheme, given.groups_to_fit(), given.weight
        self.grid, self.bits, self.scale_dtype, self.mse = given.chosen, scheme.bits, scale_dtype, method.mse
        self.order = order
        k, self.rows, self.dtype = order.numel(), len(w), working_dtype(w)
        self.width = groups.shape[2] if scheme.granularity is Granularity.GROUP else k
        dynamic = scheme.granularity is Granularity.GROUP and not method.static_groups
        self.permuted = dynamic and method.act_order
        coded = k - kept  # positions before the columns that are kept in floating point
        # Group of each position: of permuted columns, or of the plain order whatever the solver's.
        plain = group_of_each(k, self.width)[:coded]
        self.plan = [j // self.width for j in order[:coded].tolist()] if method._reorders(kept) and not self.permuted else list(plain)
        self.members: list[list[int]] = [[] for _ in range(k // self.width)]
        """Positions of each group, where ranges are found on the way."""
        for j, g in enumerate(self.plan if dynamic else ()):
            self.members[g].append(j)
        self.known: Affine | None = None
        """`[R, G]`."""
        if not dynamic:
            if kept:
                groups = without_columns(groups.reshape(-1, k // self.width, self.width), order[coded:]).view(groups.shape)
            self.known = self._fit(groups)
        self.looks_ahead = dynamic and (kept > 0 or method.block_size % self.width != 0)
        """Kept columns leave groups of any width, and wide groups reach beyond a block."""
        # A search is torch's.
        self.in_launch = in_launch and dynamic and not (self.looks_ahead or self.mse) and self.dtype is torch.float32
        if dynamic and not self.in_launch:
            ran("gptq_block_ranges", "torch")
        self.fitted: set[int] = set()
        self.scale, self.zero = (w.new_empty(len(self.members), self.rows, dtype=self.dtype) for _ in range(2))
        """`[G, N]`."""
        if self.known is not None:
            self.scale.copy_(self.known.scale.T), self.zero.copy_(self.known.zero.T)
        self.place: list[list[int]] = [[g] for g in range(len(self.members))]
        """Rows of `scale` and `zero` that each group has."""

    def _fit(self, groups: Tensor) -> Affine:
        """`[..., g]` ▸ `[...]`."""
        if _on_gpu(groups) and not self.mse:
            # Ranges go by these two alone, which one pass finds; they are the same in float32.
            groups = torch.stack(torch.aminmax(groups, dim=-1), dim=-1)
        groups = groups.to(self.dtype)
        return fit(self.grid, groups, self.bits, self.scale_dtype, self.mse).per_group()

    def how(self) -> Fit:
        width = self.width if self.in_launch else 0
        return Fit(self.rows, width, self.grid.name, self.bits, self.scale_dtype is torch.float16)

    def begin(self, start: int, end: int, weights: Tensor) -> None:
        """Fits those groups of columns start .. end - 1 that nobody else does, to the weights `[K, N]` as they are before the block."""
        if self.known is not None or self.in_launch:
            return
        for g in dict.fromkeys(self.plan[start:end]):
            if g not in self.fitted:
                new = self._fit(weights[self.members[g]].T.contiguous())
                self.scale[self.place[g]], self.zero[self.place[g]] = new.scale, new.zero
                self.fitted.add(g)

    def affine(self) -> Affine:
        """Scale and zero `[R, G]`."""
        if self.known is not None:
            return self.known
        first = [rows[0] if rows else 0 for rows in self.place]
        scale, zero = self.scale[first].T, self.zero[first].T
        empty = [g for g, members in enumerate(self.members) if not members]
        if empty:  # all their columns are kept: any range will do
            new = self._fit(scale.new_zeros(self.rows, 1, 1))
            scale[:, empty], zero[:, empty] = new.scale, new.zero
        return Affine(scale, zero, self.bits, self.grid.zero)

    def group_of_column(self) -> Tensor | None:
        """`[K]` where groups are not consecutive columns."""
        if not self.permuted:
            return None
        index = torch.empty_like(self.order)
        index[self.order] = torch.arange(self.order.numel(), device=self.order.device) // self.width
        return index


class _StackedRanges:
    """Of weights `[K, N_i]` with schemes of their own, one after another along rows."""

    def __init__(self, parts: list[_Ranges]) -> None:
        self.parts, self.rows = parts, [own.rows for own in parts]
        self.affine, self.group = stacked([(Affine(own.scale, own.zero, own.bits, own.grid.zero), own.plan) for own in parts])
        self.known = all(own.known is not None for own in parts)
        if not self.known:
            split = (torch.split(t, self.rows, dim=1) for t in (self.affine.scale, self.affine.zero))
            for own, scale, zero in zip(parts, *split, strict=True):
                # What is found from now on is written where the solver reads it.
                own.scale, own.zero = scale, zero
                own.place = [sorted({self.group[j] for j in members}) for members in own.members]
        ways = [own.how() for own in parts]
        self.fits = Fits.of(ways, self.affine.scale.device) if any(way.width for way in ways) else None

    def block(self, start: int, end: int, weights: Tensor) -> tuple[Affine, list[int]]:
        if self.known:
            return self.affine, self.group[start:end]
        for own, part in zip(self.parts, torch.split(weights, self.rows, dim=1), strict=True):
            own.begin(start, end, part)
        return self.affine, self.group[start:end]

    def odd(self) -> bool:
        """Whether a launch found ranges that are not to be used."""
        return self.fits is not None and bool(self.fits.odd)


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
        return column, column.to(dtype).to(column)

    return solve_columns(rest, upper[coded:, coded:], len(rest), keep).values.T.to(dtype).contiguous()
