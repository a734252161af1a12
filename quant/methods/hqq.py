"""HQQ (Badri and Shaji 2023, half-quadratic quantization; a project page, no arXiv id): weights only, no data.

Objective: min over zeros z of Σ |W - Ŵ|^p, p < 1, so that few large errors are tolerated. Half-quadratic steps: the error E = W - Ŵ
is shrunk, E' = sign(E) max(|E| - |E|^(p-1) / β, 0), then z becomes the group mean of codes - (W - E') / scale; the scale never changes.
Shapes: weight `[N, K]`, groups `[G, g]` in units of weights; zeros in units of codes.

axis=1: groups are g consecutive inputs of one output; g must divide K. axis=0: weight i of the row-major order belongs to group i
mod (N K / g), which is g rows of one input column, N / g apart, where g divides N; g must divide N K. Without groups axis 1 has one
scale per output, axis 0 one per input.
Reference behaviour kept: the loop stops when mean |W - Ŵ| over the whole tensor is no longer below the best so far, and the zero
computed in that last, worse iteration stays; rounding zeros (usual for 4 bits) happens before the loop only, so that they end as
real numbers; β grows by κ.
Departures: bits 1 to 8 at their own width (the reference packs 3 bits ten to an int32 and stores 5 and 6 bits as 8); its ternary
format "1.58" is no scheme here; zeros are rounded to their stored type before the final codes are chosen; float64 weights are
computed in float64, all others in float32 on every device; a symmetric scheme is served by the same grid, noted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind, grouped
from quant.errors import ScaleDtypeError, require_finite
from quant.grids import GRIDS, fit, refuse_unfit, with_stored_scales
from quant.kernels import kernel
from quant.kernels.hqq_pack import MAX_HALF_ZERO, Search
from quant.methods.base import ANY, Linear, Rounded, StoredTensor, working_dtype
from quant.parameters import Checked
from quant.scheme import Granularity, Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from quant.tensors.strided import StridedTensor

BITS_OF_ROUNDED_ZEROS = 4


@dataclass(frozen=True)
class Hqq(Checked):
    name: ClassVar[str] = "hqq"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(1, 2, 3, 4, 5, 6, 7, 8))

    axis: int = 1
    """1: groups of consecutive inputs; 0: groups of outputs of one input."""
    iters: int = 20
    """Half-quadratic steps at most; the loop stops early when the error no longer falls."""
    optimize: bool = True
    """False keeps the min-max zeros."""
    round_zero: bool | None = None
    """Round the zeros before the loop; None for 4 bits only."""
    p: float = 0.7
    """Power of the error that is minimized."""
    beta: float = 10.0
    """First weight of the quadratic term."""
    kappa: float = 1.01
    """Growth of beta per step."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ affine codes with real zeros. Raises NonFiniteError, and ValueError for groups that do not divide."""
        require_finite("weight", weight)
        w = weight.detach().to(working_dtype(weight))
        groups = self._groups(w, scheme)
        notes = ["the scheme is symmetric; hqq has a real zero per group all the same"] if scheme.symmetric else []
        # The fast twins have no float64.
        found = kernel("hqq_pack", "reference" if w.dtype is torch.float64 else "auto", weight.device)
        search = Search(self.iters, self.p, self.beta, self.kappa) if self.optimize else None
        rounded = self.round_zero or (self.round_zero is None and scheme.bits == BITS_OF_ROUNDED_ZEROS)
        steps = 0

        def in_rows(scale_dtype: torch.dtype) -> StoredTensor:
            nonlocal steps
            stream = found.backend == "cpu"
            made, steps = found.run.hqq_pack(w, scheme.bits, groups.shape[-1], scale_dtype, search, rounded, stream=stream)
            _, unfit, wrong = made.told.tolist()
            refuse_unfit(unfit, made.scale.numel())
            _refuse_zeros(wrong, made.zero.numel())
            return AffineTensor(made.codes, made.scale, made.zero, scheme.bits, ZeroKind.FLOAT, stream=made.stream)

        def run(scale_dtype: torch.dtype) -> StoredTensor:
            nonlocal steps
            affine = fit(GRIDS["hqq"], groups, scheme.bits, scale_dtype)
            zero = affine.zero.round() if rounded else affine.zero
            if search is not None:
                zero, steps = found.run.zeros(groups, affine.scale, zero, scheme.bits, search)
            zero = zero.to(scale_dtype).to(w)
            if scale_dtype is torch.float16:
                _refuse_zeros(int((~(zero.abs() <= MAX_HALF_ZERO)).sum()), zero.numel())
            final = Affine(affine.scale, zero, scheme.bits, ZeroKind.FLOAT)
            codes = final.encode(groups)
            if self.axis == 0:
                flat = codes[0].T.reshape(weight.shape).to(torch.uint8)
                return StridedTensor(flat, final.scale.flatten().to(scale_dtype), final.zero.flatten().to(scale_dtype), scheme.bits)
            return AffineTensor.build(codes.view(weight.shape), final.per_group(), scale_dtype)

        tensor, dtype_notes = with_stored_scales(scheme, run if self.axis == 0 or w.dtype is torch.float64 else in_rows)
        return Rounded(tensor, notes=notes + found.notes + dtype_notes, details={"steps": steps})

    def _groups(self, w: Tensor, scheme: WeightScheme) -> Tensor:
        """`[N, K]` ▸ `[R, G, g]`, R = 1 for axis 0."""
        if self.axis == 1:
            return grouped(w, scheme)
        n, k = w.shape
        sizes = {Granularity.TENSOR: n * k, Granularity.CHANNEL: n, Granularity.GROUP: scheme.group_size}
        size = sizes[scheme.granularity]
        assert size is not None
        if n * k % size:
            raise ValueError(f"group_size={size} does not divide the {n * k} weights of shape {(n, k)}, as axis=0 needs; choose a divisor")
        return w.reshape(size, n * k // size).T.contiguous()[None]


def _refuse_zeros(wrong: int, of: int) -> None:
    if wrong:
        raise ScaleDtypeError(f"{wrong} of {of} zeros do not fit float16")
