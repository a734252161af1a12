"""The product in CUDA C++ (`quant/csrc/lut_gemv.cu`) on tensor cores, one launch a call.

A row of out does not depend on how many there are. Sums are those of whole numbers. A value of a column of b bits whose largest is W is
rounded to W 2^(b - 24) at most. A product x w is off by another (2^(b - 1) + 1/2) 2^-21, or, where x is float32, 2^-29, at most of the
largest x W of the columns that a block has, where that is 2^-90 of x or more; with 4 bits and x in bfloat16 by 2^-10.5 more of the largest
x times a term of more than one bit of a code (`fragments.terms_of`). An x that is infinite, or not a number, makes its row of out not a
number."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.lut_gemv import Packed
from quant.kernels.lut_gemv.fragments import parts_of, prepare
from quant.kernels.products import written_to

__all__ = ["lut_gemv", "prepare", "unavailable", "values"]

MOST_PARTS = 3
"""Of 2, 3 and 4 bits."""

unavailable = partial(on_cuda.unavailable, "lut_gemv")


def arguments(packed: Packed) -> tuple[list[Tensor | int], list[Tensor | int]]:
    """Five for each of at most 3 parts, and three for the weights kept aside; zeros where there are none."""
    parts: list[Tensor | int] = []
    for part in parts_of(packed):
        parts += [*on_cuda.aligned(part.words, part.values), part.columns.contiguous(), len(part.columns), part.bits]
    parts += [0] * (5 * MOST_PARTS - len(parts))
    kept = packed.apart
    return parts, [0, 0, 0] if kept is None else [kept.starts.contiguous(), kept.columns.contiguous(), kept.differences.contiguous()]


def lut_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    made, given = written_to(x, packed.shape, out), x.detach().contiguous()
    parts, kept = arguments(packed)
    scale = 0 if packed.input_scale is None else packed.input_scale.contiguous()
    counts = (len(packed.parts), *packed.shape, x.shape[0], int(x.dtype is torch.bfloat16))
    on_cuda.call("lut_gemv", "bitgrid_lut_gemv", *parts, *kept, given, scale, made, *counts)
    return made


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    # Differences of the weights kept aside are from values in float32.
    kind = dtype if dtype is torch.bfloat16 and packed.apart is None else torch.float32
    made = torch.empty(packed.shape, dtype=kind, device=packed.parts[0].words.device)
    for part in parts_of(packed):
        tensors = (*on_cuda.aligned(part.words, part.values), part.columns.contiguous(), made)
        on_cuda.call("lut_gemv", "bitgrid_lut_values", *tensors, len(part.columns), part.bits, *packed.shape, int(kind is torch.bfloat16))
    return packed.with_apart(made).to(dtype)
