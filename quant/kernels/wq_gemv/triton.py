"""The product in Triton: portable rather than fast, on the layout that the C++ twin reads."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.on_triton import unavailable
from quant.kernels.products import given_to, written_to
from quant.kernels.wq_gemv import LANES, Packed, prepare

__all__ = ["prepare", "unavailable", "values", "wq_gemv"]

UNITS = {2: 4, 3: 2, 4: 8, 8: 16}
"""Of the layout, that a program reads at a time: 512 columns."""


def wq_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    from quant.kernels.wq_gemv.program import gemv

    made, given = written_to(x, packed.shape, out), given_to(x, packed.input_scale)
    sums = made if made.dtype is torch.float32 else torch.empty(made.shape, device=x.device)
    n, k = packed.shape
    tiles, units, words = packed.words.shape[:3]
    codes = 32 if packed.bits == 3 else 32 // packed.bits
    assert packed.words.shape[3:] == (LANES, LANES)
    gemv[(tiles, x.shape[0])](
        packed.words.contiguous(), packed.ranges.contiguous(), given, sums, n, k, units, packed.groups, k // packed.groups,
        BITS=packed.bits, WORDS=words, CODES=codes, UNITS=UNITS[packed.bits], num_warps=4,
    )  # fmt: skip
    return made if sums is made else made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    from quant.kernels.wq_gemv.program import weight

    made = torch.empty(packed.shape, dtype=dtype, device=packed.words.device)
    n, k = packed.shape
    tiles, units, words = packed.words.shape[:3]
    codes, together = 32 if packed.bits == 3 else 32 // packed.bits, UNITS[packed.bits]
    weight[(tiles, -(-units // together))](
        packed.words.contiguous(), packed.ranges.contiguous(), made, n, k, units, packed.groups, k // packed.groups,
        BITS=packed.bits, WORDS=words, CODES=codes, UNITS=together, num_warps=4,
    )  # fmt: skip
    return made
