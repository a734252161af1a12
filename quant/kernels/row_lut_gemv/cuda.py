"""The product in CUDA C++ (`quant/csrc/row_lut_gemv.cu`), one launch a call; a row of out does not depend on how many there are."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.products import written_to
from quant.kernels.row_lut_gemv import Packed, prepare

__all__ = ["prepare", "row_lut_gemv", "unavailable", "values"]

unavailable = partial(on_cuda.unavailable, "row_lut_gemv")


def row_lut_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    made, given = written_to(x, packed.shape, out), x.detach().contiguous()
    on_cuda.call("row_lut_gemv", "bitgrid_row_lut_gemv", *arguments(given, packed, made))
    return made


def arguments(x: Tensor, packed: Packed, out: Tensor) -> tuple[Tensor | int, ...]:
    """Of the library's function, but for the stream."""
    scale = 0 if packed.input_scale is None else packed.input_scale.contiguous()
    kinds = (packed.bits, int(packed.tables.dtype is torch.float16), int(x.dtype is torch.bfloat16))
    return packed.words.contiguous(), packed.tables.contiguous(), x, scale, out, *packed.shape, x.shape[0], *kinds


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    kind = dtype if dtype is torch.bfloat16 else torch.float32
    made = torch.empty(packed.shape, dtype=kind, device=packed.words.device)
    kinds = (packed.bits, int(packed.tables.dtype is torch.float16), int(kind is torch.bfloat16))
    tensors = (packed.words.contiguous(), packed.tables.contiguous(), made)
    on_cuda.call("row_lut_gemv", "bitgrid_row_lut_values", *tensors, *packed.shape, *kinds)
    return made.to(dtype)
