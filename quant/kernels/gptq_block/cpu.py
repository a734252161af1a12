"""The block in C++ (`quant/csrc/gptq_block.cpp`), on torch's number of threads."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.kernels.gptq_block import SolvedBlock
from quant.kernels.native import NoLibrary, library

ENTRIES = {torch.float32: "bitgrid_gptq_block_f32", torch.float64: "bitgrid_gptq_block_f64"}
KINDS = {ZeroKind.FLOAT: 1, ZeroKind.MINIMUM: 2}
"""All other kinds are 0: a whole zero, added after rounding."""


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ library works on CPU tensors, not on {device}"
    found = library("gptq_block")
    return str(found) if isinstance(found, NoLibrary) else None


def solve_block(block: Tensor, upper: Tensor, affine: Affine, group: list[int]) -> SolvedBlock:
    found = library("gptq_block")
    if isinstance(found, NoLibrary):
        raise RuntimeError(str(found))
    w = block.contiguous()
    # Kept by name until the call is over: only addresses are passed.
    u, scale, zero = (t.to(w).contiguous() for t in (upper, affine.scale, affine.zero))
    rows = torch.tensor(group, dtype=torch.int64)
    codes, values, errors = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
    function = getattr(found, ENTRIES[w.dtype])
    function.restype = None
    pointers = [t.data_ptr() for t in (w, u, scale, zero, rows)]
    numbers = [*w.shape, affine.top, KINDS.get(affine.kind, 0)]
    out = [t.data_ptr() for t in (codes, values, errors)]
    function(*map(ctypes.c_int64, (*pointers, *numbers, *out, torch.get_num_threads())))
    return SolvedBlock(codes, values, errors)
