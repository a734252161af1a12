"""The product in C++ (`quant/csrc/wq_gemv.cpp`), on torch's number of threads."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quant.kernels.native import NoLibrary, library
from quant.kernels.wq_gemv import Packed, prepare, written_to

__all__ = ["prepare", "unavailable", "wq_gemv"]


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ library works on CPU tensors, not on {device}"
    found = library("wq_gemv")
    return str(found) if isinstance(found, NoLibrary) else None


def wq_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    found = library("wq_gemv")
    if isinstance(found, NoLibrary):
        raise RuntimeError(str(found))
    made = written_to(x, packed, out)
    # Kept by name until the call is over: only addresses are passed.
    given = x.detach().float()
    if packed.input_scale is not None:
        given = given / packed.input_scale
    given, words, ranges = given.contiguous(), packed.words.contiguous(), packed.ranges.contiguous()
    sums = made if made.dtype is torch.float32 else torch.empty(made.shape, dtype=torch.float32)
    function = found.bitgrid_wq_gemv
    function.restype = None
    pointers = [t.data_ptr() for t in (words, ranges, given, sums)]
    function(*map(ctypes.c_int64, (*pointers, *packed.shape, packed.groups, packed.bits, x.shape[0], torch.get_num_threads())))
    return made if sums is made else made.copy_(sums)
