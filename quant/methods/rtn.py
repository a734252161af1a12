"""RTN: round every weight to the nearest value of its grid; no data.

Objective: min |w - ŵ| per weight. Repositories mean different grids by "RTN" (`quant.grids`): GPTQ's is g_asym per
row, AWQ's awq_asym in groups, QuaRot's q_sym per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, grouped
from quant.errors import require_finite
from quant.grids import choose_grid, fit, grid, with_stored_scales
from quant.methods.base import ANY, Linear, Rounded
from quant.scheme import Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor


@dataclass(frozen=True)
class Rtn:
    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports()

    grid: str | None = None
    """A name of `quant.grids`; None is g_sym or g_asym as the scheme says."""
    mse: bool = False
    """Search the range of least error instead of taking the whole range."""

    def __post_init__(self) -> None:
        if self.grid is not None:
            grid(self.grid)

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ affine codes; computes in float32. Raises NonFiniteError, and ValueError for groups that do not divide K."""
        require_finite("weight", weight)
        chosen, notes = choose_grid(self.grid, scheme)
        groups = grouped(weight.detach().float(), scheme)

        def run(scale_dtype: torch.dtype) -> AffineTensor:
            affine = fit(chosen, groups, scheme.bits, scale_dtype, self.mse)
            per_group = Affine(affine.scale[..., 0], affine.zero[..., 0], scheme.bits, affine.kind)
            return AffineTensor.build(affine.encode(groups).view(weight.shape), per_group, scale_dtype)

        tensor, dtype_notes = with_stored_scales(scheme, run)
        return Rounded(tensor, notes=notes + dtype_notes)
