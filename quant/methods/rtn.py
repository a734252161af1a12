"""RTN: round every weight to the nearest value of its grid; no data.

Objective: min |w - ŵ| per weight. Repositories mean different grids by "RTN" (`quant.grids`): GPTQ's is g_asym per row, AWQ's awq_asym in
groups, QuaRot's q_sym per row. Number formats of the scheme other than integers have values and scales of their own
(`quant.number_formats`): `grid` and `mse` then say nothing, which is noted. Shapes: weight `[N, K]`, scale and zero `[N, G]`. Defaults:
the scheme's own grid over its whole range. Departure: codes are chosen with the scale as it is stored (float16 or float32), where
reference code rounds with float32 scales whatever it stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import group_width, grouped
from quant.errors import require_finite
from quant.grids import choose_grid, refuse_unfit, with_stored_scales, without_grid
from quant.kernels import kernel
from quant.methods.base import ANY, Linear, Rounded, working_dtype
from quant.number_formats import encode, number_format
from quant.parameters import Checked
from quant.scheme import ANY_NUMBER, Granularity, Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from quant.tensors.floating import FloatingTensor


@dataclass(frozen=True)
class Rtn(Checked):
    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(numbers=ANY_NUMBER)

    grid: str | None = None
    """A name of `quant.grids`; None is g_sym or g_asym as the scheme says."""
    mse: bool = False
    """Search the range of least error instead of taking the whole range."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ affine codes, in float32, or codes of a number format (`round_floating`). Raises NonFiniteError, and ValueError for
        groups that do not divide K."""
        if scheme.number != "int":
            require_finite("weight", weight)
            floating = round_floating(weight, scheme)
            floating.notes += without_grid(self.grid, self.mse, scheme)
            return floating
        chosen, notes = choose_grid(self.grid, scheme)
        width = group_width(scheme, *weight.shape)
        # One group in all would be the work of one program.
        alone = scheme.granularity is Granularity.TENSOR
        found = kernel("rtn_pack", "reference" if alone else "auto", weight.device)
        # The reference packs in a step of its own, which not every caller needs.
        stream = found.backend != "reference"

        def run(scale_dtype: torch.dtype) -> AffineTensor:
            made = found.run.rtn_pack(weight, chosen.name, scheme.bits, width, scale_dtype, stream=stream, mse=self.mse)
            broken, unfit = made.told.tolist()
            if broken:
                require_finite("weight", weight)
            refuse_unfit(unfit, made.scale.numel())
            return AffineTensor(made.codes, made.scale, made.zero, scheme.bits, chosen.zero, stream=made.stream)

        tensor, dtype_notes = with_stored_scales(scheme, run)
        return Rounded(tensor, notes=notes + found.notes + dtype_notes)


def round_floating(weight: Tensor, scheme: WeightScheme) -> Rounded:
    """`[N, K]` ▸ codes of the scheme's number format; float64 is computed in float64, all else in float32."""
    format = number_format(scheme.number)
    groups = grouped(weight.detach().to(working_dtype(weight)), scheme)

    def run(scale_dtype: torch.dtype) -> FloatingTensor:
        scales = format.fit(groups.abs().amax(-1), scale_dtype)
        codes = encode(format, groups, format.read(scales)[..., None])
        return FloatingTensor(codes.to(torch.uint8).view(weight.shape), scales, scheme.number)

    tensor, notes = with_stored_scales(scheme, run)
    return Rounded(tensor, notes=notes)
