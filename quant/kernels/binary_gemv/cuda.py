"""The product in CUDA C++ (`quant/csrc/binary_gemv.cu`), one launch a call.

Fast for blocks of a multiple of 128 columns. There x is rounded to a multiple of 2^-26 of the largest |x| of at most 512 columns, which a
warp takes together. Sums are those of whole numbers: each product is off by half of that at most, and by what a value of the weight is. It
is rounded to a multiple of 2^-23 of its row's largest where x is float32, of 2^-15 where x is bfloat16, that has itself 2^-8 of each.
A row of x with a number that is not finite gives one of NaN.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.binary_gemv import Packed
from quant.kernels.binary_gemv.digits import check, prepare
from quant.kernels.products import written_to
from quant.kernels.wq_gemv import LANES

__all__ = ["binary_gemv", "prepare", "unavailable", "values"]

MOST_TILES = 65520
"""Of eight rows, in a launch of `values`: a grid has at most 65,535 blocks, and parts of a tensor begin at multiples of 16 bytes."""

unavailable = partial(on_cuda.unavailable, "binary_gemv")


def binary_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; sums of columns that warps take together are added up in float32."""
    check(packed)
    made, given = written_to(x, packed.shape, out), x.detach().contiguous()
    scale = 0 if packed.input_scale is None else packed.input_scale.contiguous()
    tensors = (*on_cuda.aligned(packed.words, packed.tables, packed.salient, packed.largest), given, scale, made)
    on_cuda.call("binary_gemv", "bitgrid_binary_gemv", *tensors, *packed.shape, packed.block, x.shape[0], int(x.dtype is torch.bfloat16))
    return made


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    check(packed)
    kind = dtype if dtype is torch.bfloat16 else torch.float32
    n, k = packed.shape
    made = torch.empty(n, k, dtype=kind, device=packed.words.device)
    for first in range(0, packed.words.shape[0], MOST_TILES):
        some, rows = slice(first, first + MOST_TILES), made[first * LANES : (first + MOST_TILES) * LANES]
        weight = (packed.words[some], packed.tables[:, some], packed.salient, packed.largest[some])
        tensors = (*on_cuda.aligned(*weight), rows)
        on_cuda.call("binary_gemv", "bitgrid_binary_values", *tensors, len(rows), k, packed.block, int(kind is torch.bfloat16))
    return made.to(dtype)
