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


def solve_block(block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None = None) -> SolvedBlock:
    found = library("gptq_block")
    if isinstance(found, NoLibrary):
        raise RuntimeError(str(found))
    w = block.contiguous()
    # Kept by name until the call is over: only addresses are passed.
    u, scale, zero = (t.to(w).contiguous() for t in (upper, affine.scale, affine.zero))
    rows = torch.tensor(group, dtype=torch.int64)
    out = SolvedBlock.like(w) if out is None else out
    made = [out.codes, out.values, out.errors]
    if not all(t.is_contiguous() and t.dtype == w.dtype and t.shape == w.shape for t in made):
        got = [(tuple(t.shape), t.dtype) for t in made]
        raise ValueError(f"out holds {got}; it must be contiguous and like the block: {tuple(w.shape)}, {w.dtype}")
    function = getattr(found, ENTRIES[w.dtype])
    function.restype = None
    pointers = [t.data_ptr() for t in (w, u, scale, zero, rows)]
    numbers = [*w.shape, affine.top, KINDS.get(affine.kind, 0)]
    function(*map(ctypes.c_int64, (*pointers, *numbers, *(t.data_ptr() for t in made), torch.get_num_threads())))
    return out
