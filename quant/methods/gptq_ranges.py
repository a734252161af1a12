"""Ranges of the columns that GPTQ solves: `quant.methods.gptq`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant.affine import Affine, group_of_each, grouped
from quant.grids import Grid, fit
from quant.kernels import ran
from quant.kernels.gptq_block import Fit, Fits, stacked
from quant.methods.base import working_dtype
from quant.outliers import without_columns
from quant.scheme import Granularity, WeightScheme

if TYPE_CHECKING:
    from quant.methods.gptq import Gptq


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


@dataclass
class Given:
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


class Ranges:
    """Scale and zero of every group of some rows: known before the solver starts (per row, per tensor, static), or found on the way: by the
    launch that solves a group's block where it can, elsewhere by torch before the block that the group begins in."""

    def __init__(self, method: Gptq, given: Given, scale_dtype: torch.dtype, order: Tensor, kept: int, in_launch: bool) -> None:
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
        self.plan = [j // self.width for j in order[:coded].tolist()] if method.reorders(kept) and not self.permuted else list(plain)
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
        # A search is torch's.
        self.in_launch = in_launch and dynamic and not (method.looks_ahead(scheme, kept) or self.mse) and self.dtype is torch.float32
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
        if on_gpu(groups) and not self.mse:
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


class StackedRanges:
    """Of weights `[K, N_i]` with schemes of their own, one after another along rows."""

    def __init__(self, parts: list[Ranges]) -> None:
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
