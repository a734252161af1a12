"""The product in Triton: portable rather than fast."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.on_triton import unavailable
from quant.kernels.products import given_to, written_to
from quant.kernels.row_lut_gemv import Packed, prepare

__all__ = ["prepare", "row_lut_gemv", "unavailable", "values"]

COLUMNS = 64
"""That a program reads at a time."""


def row_lut_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    from quant.kernels.row_lut_gemv.program import rows

    made, given = written_to(x, packed.shape, out), given_to(x, packed.input_scale)
    sums = torch.empty(made.shape, device=x.device)
    tiles, units = packed.words.shape[:2]
    words, tables = packed.words.contiguous(), packed.tables.contiguous()
    rows[(tiles, x.shape[0])](words, tables, given, sums, *packed.shape, units, BITS=packed.bits, COLUMNS=COLUMNS, num_warps=4)
    return made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    from quant.kernels.row_lut_gemv.program import weight

    made = torch.empty(packed.shape, dtype=dtype, device=packed.words.device)
    tiles, units = packed.words.shape[:2]
    words, tables = packed.words.contiguous(), packed.tables.contiguous()
    grid = (tiles, -(-packed.shape[1] // COLUMNS))
    weight[grid](words, tables, made, *packed.shape, units, BITS=packed.bits, COLUMNS=COLUMNS, num_warps=4)
    return made
