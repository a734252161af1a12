"""The product in Triton: portable rather than fast."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.lut_gemv import Packed, prepare, side_by_side
from quant.kernels.on_triton import unavailable
from quant.kernels.products import given_to, written_to

__all__ = ["lut_gemv", "prepare", "unavailable", "values"]

WORDS, BLOCK = 16, 64
"""Of a row, and weights kept aside, that a program reads at a time."""


def lut_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    from quant.kernels.lut_gemv.program import apart, entries

    made, given = written_to(x, packed.shape, out), given_to(x, packed.input_scale)
    sums = torch.zeros(made.shape, device=x.device)
    n, k = packed.shape
    for part in side_by_side(packed):
        tiles, length = part.words.shape[:2]
        entries[(tiles, x.shape[0])](
            part.words.contiguous(), part.values.contiguous(), part.columns, given, sums, n, k, len(part.columns), length,
            BITS=part.bits, CODES=32 // part.bits, WORDS=WORDS, num_warps=4,
        )  # fmt: skip
    if packed.apart is not None:
        kept = packed.apart
        apart[(n, x.shape[0])](kept.starts, kept.columns, kept.differences, given, sums, n, k, BLOCK=BLOCK, num_warps=2)
    return made.copy_(sums)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    from quant.kernels.lut_gemv.program import weight

    # Differences of the weights kept aside are from values in float32.
    made = torch.empty(packed.shape, dtype=dtype if packed.apart is None else torch.float32, device=packed.parts[0].words.device)
    n, k = packed.shape
    for part in side_by_side(packed):
        tiles, length = part.words.shape[:2]
        weight[(tiles, -(-length // WORDS))](
            part.words.contiguous(), part.values.contiguous(), part.columns, made, n, k, len(part.columns), length,
            BITS=part.bits, CODES=32 // part.bits, WORDS=WORDS, num_warps=4,
        )  # fmt: skip
    return packed.with_apart(made).to(dtype)
