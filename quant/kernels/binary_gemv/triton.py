"""The product in Triton: portable rather than fast."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.binary_gemv import Packed, check, prepare
from quant.kernels.on_triton import unavailable
from quant.kernels.products import given_to, written_to

__all__ = ["binary_gemv", "prepare", "unavailable", "values"]

UNITS = 4
"""That a program reads at a time: 512 columns."""


def binary_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    from quant.kernels.binary_gemv.program import signs

    check(packed)
    made, given = written_to(x, packed.shape, out), given_to(x, packed.input_scale)
    sums = made if made.dtype is torch.float32 else torch.empty(made.shape, device=x.device)
    n, k = packed.shape
    tiles, units = packed.words.shape[:2]
    signs[(tiles, x.shape[0])](
        packed.words.contiguous(), packed.tables.contiguous(), packed.salient, given, sums,
        n, k, units, packed.tables.shape[1], packed.block, UNITS=UNITS, num_warps=4,
    )  # fmt: skip
    return made if sums is made else made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    from quant.kernels.binary_gemv.program import weight

    check(packed)
    made = torch.empty(packed.shape, dtype=dtype, device=packed.words.device)
    n, k = packed.shape
    tiles, units = packed.words.shape[:2]
    weight[(tiles, -(-units // UNITS))](
        packed.words.contiguous(), packed.tables.contiguous(), packed.salient, made,
        n, k, units, packed.tables.shape[1], packed.block, UNITS=UNITS, num_warps=4,
    )  # fmt: skip
    return made
