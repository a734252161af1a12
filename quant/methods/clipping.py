"""Learned weight clipping (OmniQuant, Shao et al. 2023, arXiv 2308.13137, eq. 2) of one linear.

    range = [sigmoid(lower) · min w, sigmoid(upper) · max w]   per row or group, lower = upper = 4 at the start

sigmoid(4) = 0.982: the first range already clips 1.8 %. Scale and zero follow from the range and the grid in every forward;
rounding is straight-through. A symmetric grid takes the larger end of the clipped range.
Departure: where Omni's grid would have to cut its zero off at ±1e4 (all-equal groups), the range is extended to hold 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind, grouped
from quant.errors import ScaleDtypeError, require_finite
from quant.grids import DTYPES, affine_of, check_stored, choose_grid
from quant.methods.base import Rounded
from quant.scheme import WeightScheme
from quant.straight_through import affine_through, round_through, scaled_limits
from quant.tensors.affine import AffineTensor

START = 4.0


class Clipping(Protocol):
    """What is learned of one linear's quantizer."""

    def parameters(self) -> list[Tensor]: ...

    def soft(self, weight: Tensor) -> Tensor: ...

    def hard(self, weight: Tensor) -> Rounded: ...


class LearnedClipping:
    """Holds the parameters; the weight is given anew each time, as an equivalent transform may change it."""

    def __init__(self, name: str, weight: Tensor, scheme: WeightScheme, grid: str | None, learn: bool = True) -> None:
        require_finite(f"weight {name}", weight)
        self._scheme = scheme
        self._grid, self._notes = choose_grid(grid, scheme)
        shape = (*grouped(weight, scheme).shape[:2], 1)
        self.upper = torch.full(shape, START, dtype=weight.dtype, device=weight.device, requires_grad=learn)
        self.lower = torch.full(shape, START, dtype=weight.dtype, device=weight.device, requires_grad=learn)
        self._learn = learn
        self._scale_dtype = DTYPES[scheme.scale_dtype]

    def parameters(self) -> list[Tensor]:
        return [self.upper, self.lower] if self._learn else []

    def _limits(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        factors = (torch.sigmoid(self.lower), torch.sigmoid(self.upper)) if self._learn else (1.0, 1.0)
        low, high = scaled_limits(self._grid, groups, *factors)
        if self._grid.zero is not ZeroKind.INTEGER:
            return low, high
        # Almost equal values far from 0 need a zero beyond the ±1e4 of Omni's grid, which would lose them: such a range is given 0.
        far = low.abs() > 1e4 * self._grid.step(low, high, self._scheme.bits)
        return torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)

    def soft(self, weight: Tensor) -> Tensor:
        """`[N, K]` with gradients for the weight and the parameters; the values of `hard`."""
        groups = grouped(weight, self._scheme)
        affine = affine_through(self._grid, *self._limits(groups), self._scheme.bits, self._scale_dtype)
        return round_through(affine, groups).view(weight.shape)

    @torch.no_grad()
    def hard(self, weight: Tensor) -> Rounded:
        """What is stored. Scales that do not fit their type are kept in float32 from then on, noted."""
        groups = grouped(weight, self._scheme)
        low, high = self._limits(groups)
        try:
            affine = self._affine(groups, low, high)
        except ScaleDtypeError as e:
            self._scale_dtype = torch.float32
            self._notes.append(f"{e}; scales are stored in float32")
            affine = self._affine(groups, low, high)
        ranges = affine.per_group()
        if affine.kind is ZeroKind.INTEGER and bool(((affine.zero >= 0) & (affine.zero <= affine.top)).all()):
            # Zeros among the codes take as many bits as a code; 16 where one group's values lie on one side of 0.
            ranges = replace(ranges, kind=ZeroKind.CODE)
        tensor = AffineTensor.build(affine.encode(groups).view(weight.shape), ranges, self._scale_dtype)
        return Rounded(tensor, notes=list(self._notes))

    def _affine(self, groups: Tensor, low: Tensor, high: Tensor) -> Affine:
        affine = affine_of(self._grid, low, high, self._scheme.bits, self._scale_dtype)
        check_stored(affine, groups, self._scale_dtype)
        return affine
