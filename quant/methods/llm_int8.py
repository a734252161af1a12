"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): vector-wise 8-bit products with the outlier inputs kept in 16 bits.

Objective: y = Q_row(X_r) Q_row(W_r)ᵀ + X_o W_oᵀ, o = inputs with |x| ≥ 6 anywhere in the sequence, r the others; Q_row rounds a row
to 127 steps of its max |·|. Weight `[N, K]` ▸ int8 rows with a scale `[N]`.
The method is the weights' part. Which inputs are outliers is seen at run time: `activation.outlier_threshold` of the scheme
(`conf/scheme/w8a8_llm_int8.yaml`).
As in the reference code (bitsandbytes), W_o is the int8 weight too, multiplied in 16 bits: one stored weight serves both
products. Departures: outliers are looked for per sequence instead of per batch (quant/activation.py); the product of int8
codes is simulated in the model's own dtype; rows of zeros have the scale 1, not 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.errors import require_finite
from quant.grids import GRIDS, fit, with_stored_scales
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.bitsandbytes import int8_rows
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor

ZERO = 128


@dataclass(frozen=True)
class LlmInt8(Checked):
    name: ClassVar[str] = "llm_int8"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(8,), granularity=("channel",))

    backend: str = "native"
    """native, or bitsandbytes: the codes are made by that package, where it is installed."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ affine codes with the constant zero 128; computes in float32. Raises NonFiniteError."""
        require_finite("weight", weight)
        w = weight.detach().float()

        def run(scale_dtype: torch.dtype) -> AffineTensor:
            rows = fit(GRIDS["q_sym"], w, 8, scale_dtype)
            if self.backend == "native":
                codes = rows.encode(w)
            else:
                made, peak = int8_rows(w)
                codes = made.float() + ZERO
                exact = torch.where(peak == 0, 1.0, peak / 127)[:, None]
                rows = Affine(exact.to(scale_dtype).to(exact), rows.zero, 8, ZeroKind.CONSTANT)
            return AffineTensor.build(codes, rows, scale_dtype)

        tensor, notes = with_stored_scales(scheme, run)
        return Rounded(tensor, notes=notes)
