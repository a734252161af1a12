"""The block in C++ (`quant/csrc/gptq_block.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels import native
from quant.kernels.gptq_block import KINDS, Fits, SolvedBlock

ENTRIES = {torch.float32: "bitgrid_gptq_block_f32", torch.float64: "bitgrid_gptq_block_f64"}


unavailable = partial(native.unavailable, "gptq_block")


def solve_block(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None = None, fits: Fits | None = None
) -> SolvedBlock:
    if fits is not None:
        fits.check(block, affine)
    w = block.contiguous()
    u, scale, zero = (t.to(w).contiguous() for t in (upper, affine.scale, affine.zero))
    tops = 0 if affine.tops is None else affine.tops.to(w).contiguous()
    rows = torch.tensor(group, dtype=torch.int64)
    out = SolvedBlock.like(w) if out is None else out
    made = [out.codes, out.values, out.errors]
    if not all(t.is_contiguous() and t.dtype == w.dtype and t.shape == w.shape for t in made):
        got = [(tuple(t.shape), t.dtype) for t in made]
        raise ValueError(f"out holds {got}; it must be contiguous and like the block: {tuple(w.shape)}, {w.dtype}")
    numbers = (*w.shape, affine.top, KINDS.get(affine.kind, 0))
    found = (0, 0) if fits is None else (fits.words, fits.odd)
    native.call("gptq_block", ENTRIES[w.dtype], w, u, scale, zero, tops, rows, *found, *numbers, *made, torch.get_num_threads())
    return out
