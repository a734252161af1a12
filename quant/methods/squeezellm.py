"""The dense part of SqueezeLLM (Kim et al. 2023, arXiv 2306.07629, section 4.1): k-means of each output row, weighted by sensitivity.

Objective: row i of the weight `[N, K]` gets the table C_i of 2^b values that makes Σ_j F_ij (w_ij - Q(w_ij))² least, Q the nearest value of
the table; F is the sensitivity. Shapes: Hessian `[K, K]`, tables `[N, 2^b]`.
Departure: F is diag(H) of the inputs, (2 / sequences) Σ x_j², where the paper has the diagonal of the Fisher information, the mean of
(g_i x_j)² with the gradient g of the loss at the outputs. Where g_i and x_j are independent these differ by the factor E[g_i²], one number
for a row, which changes no table. weighting=none is plain k-means.
Not here: the paper's sparse part (outliers and the most sensitive weights kept apart).
Other departures: k-means starts from a partition instead of at random (`quant.kernels.kmeans_columns`); tables are rounded to the stored
type before codes are chosen; a row of at most 2^b values is kept exactly. A weight whose input is always 0 moves no value of its table.
Float64 weights are computed in float64, all others in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.grids import with_stored_scales
from quant.kernels import kernel
from quant.kernels.kmeans_columns import unfit
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.feedback import checked
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.row_codebook import RowCodebookTensor


@dataclass(frozen=True)
class SqueezeLlm(Checked):
    name: ClassVar[str] = "squeezellm"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(2, 3, 4), granularity=("channel",))

    weighting: str = "hessian"
    """Of squared errors: hessian (the diagonal of the inputs' Hessian) or none."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ a table per row. Raises NonFiniteError, and ValueError for a missing or misshapen Hessian."""
        w, hessian = checked(self.name, weight, statistics)
        notes = ["codebooks have no symmetric form: weight.symmetric has no effect"] if scheme.symmetric else []
        sensitivity = None
        if self.weighting == "hessian":
            diagonal = hessian.diagonal().clamp(min=0)
            if bool(diagonal.any()):
                sensitivity = diagonal
            else:
                notes.append("all inputs are always 0 on the calibration text: all weights count the same")
        found = kernel("kmeans_columns", device=w.device)
        centres = found.run.kmeans(w, 2**scheme.bits, "partition", sensitivity)

        def run(dtype: torch.dtype) -> RowCodebookTensor:
            tables = centres.to(dtype)
            wrong = 0 if dtype is torch.float32 else int(unfit(centres, tables).sum())
            if wrong:
                raise ScaleDtypeError(f"{wrong} of {len(tables)} codebooks do not fit float16")
            return RowCodebookTensor(found.run.nearest(w, tables.to(w)), tables, scheme.bits)

        tensor, dtype_notes = with_stored_scales(scheme, run)
        return Rounded(tensor, notes=[*notes, *found.notes, *dtype_notes])
