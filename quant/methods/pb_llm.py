"""PB-LLM in its GPTQ form (Shang et al. 2023, arXiv 2310.00034): most weights binarized, the salient ones kept at 8 bits.

Objective: min tr((W - Q) H (W - Q)ᵀ) column by column, H as in GPTQ. Shapes: weight `[N, K]`, Hessian `[K, K]`.
Saliency is |w| (magnitude) or w²/U_jj² (hessian), H⁻¹ = UᵀU; the least `low_fraction` of all weights (of each group of columns,
where the scheme has groups) become sign · α + μ with one α and μ per row and group, frozen before the first column; the others
are rounded on the grid g_asym of their whole row. Group sizes need not divide K.

variant     least salient                          α and μ                                   range of the codes
reference   those up to sorted[int(n f)]: one      over the whole group, zeros where a       of the row as given
            more than n f, and all its equals      salient weight is (unless masked_stats)
corrected   exactly int(n f), ties by position;    over the binarized weights                of the row without dead
            hessian: w²/[H⁻¹]_jj                                                             inputs
The reference's f = 0 skips the layer, so it is refused here. Departures: sign(0) is +1, as one bit stores it; f = 1 binarizes
all; damping and dead inputs as in `gptq`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.binary import binarize, stored
from quant.grids import GRIDS, fit, with_stored_scales
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.feedback import Prepared, prepare
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.solver import Solved, solve_columns
from quant.statistics import Statistics
from quant.tensors.partially_binary import PartiallyBinaryTensor


@dataclass(frozen=True)
class PbLlm(Checked):
    name: ClassVar[str] = "pb_llm"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(1,), granularity=("channel", "group"), ragged_groups=True)

    low_fraction: float = 0.9
    """Share of the weights that are binarized."""
    high_bits: int = 8
    """Of the others."""
    metric: str = "magnitude"
    """magnitude or hessian."""
    masked_stats: bool = False
    """Scales and means over the binarized weights alone, as variant corrected has them."""
    variant: str = "reference"
    """reference or corrected."""
    block_size: int = 128
    """Columns between updates of all later columns; changes no result."""
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ codes and signs. Raises NonFiniteError, SingularHessianError, and ValueError for shapes that do not fit."""
        ready = prepare(self.name, weight, statistics, self.damp)
        group = min(scheme.group_size or weight.shape[1], weight.shape[1])
        low = self._low(ready, group)
        (tensor, solved), notes = with_stored_scales(scheme, lambda dtype: self._run(ready, low, group, dtype))
        details = {"low_share": float(low.double().mean()), "solver_loss": float(solved.loss.sum())}
        return Rounded(tensor, ready.damp, [*ready.notes, *solved.notes, *notes], details)

    @property
    def _corrected(self) -> bool:
        return self.variant == "corrected"

    def _low(self, ready: Prepared, group: int) -> Tensor:
        """bool `[N, K]`: True where a weight is binarized."""
        saliency = ready.weight.abs()
        if self.metric == "hessian":
            inverse = ready.upper.square().sum(0) if self._corrected else ready.upper.diagonal().square()
            saliency = ready.weight.square() / inverse
        parts = []
        for start in range(0, saliency.shape[1], group):
            part = saliency[:, start : start + group]
            count = int(part.numel() * self.low_fraction)
            flat = part.reshape(-1)
            if self._corrected:
                low = torch.zeros_like(flat, dtype=torch.bool)
                low[torch.argsort(flat, stable=True)[:count]] = True
            else:
                low = flat <= flat.sort().values[min(count, flat.numel() - 1)]
            parts.append(low.view(part.shape))
        return torch.cat(parts, dim=1)

    def _run(self, ready: Prepared, low: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[PartiallyBinaryTensor, Solved]:
        high = fit(GRIDS["g_asym"], ready.weight if self._corrected else ready.given, self.high_bits, scale_dtype)
        scales, means = [], []
        masked = self.masked_stats or self._corrected
        for start in range(0, low.shape[1], group):
            w, mask = (t[:, start : start + group] for t in (ready.weight, low))
            fitted = binarize(w * mask, mask if masked else torch.ones_like(mask), 1)
            scales.append(fitted.scale[0])
            means.append(fitted.mean[0])
        scale, mean = stored([torch.stack(scales, 1), torch.stack(means, 1)], scale_dtype)
        one = high.per_group()

        def round_column(j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            codes = one.encode(column)
            a, m = scale[:, j // group], mean[:, j // group]
            plus = column - m >= 0
            value = torch.where(low[:, j], torch.where(plus, a, -a) + m, one.decode(codes))
            return torch.where(low[:, j], plus.to(codes), codes), value

        solved = solve_columns(ready.weight.T, ready.upper, self.block_size, round_column)
        tensor = PartiallyBinaryTensor(
            solved.codes.T.contiguous(),
            ~low,
            high.scale.to(scale_dtype),
            high.zero.to(torch.uint8),
            scale.to(scale_dtype),
            mean.to(scale_dtype),
            self.high_bits,
            group,
            self.low_fraction,
        )
        return tensor, solved
