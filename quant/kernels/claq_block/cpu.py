"""The block in C++ (`quant/csrc/claq_block.cpp`), on one thread: its columns wait for each other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.grids import ScaleDtypeError
from quant.kernels import native
from quant.kernels.claq_block import REASONS, Found, SolvedBlock, Wanted
from quant.kernels.kmeans_columns import STEPS, bins
from quant.kernels.kmeans_columns.cpu import SUFFIX, numbers

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Numbers that the C++ knows stored types by."""

unavailable = partial(native.unavailable, "claq_block")


def solve_block(block: Tensor, upper: Tensor, wanted: Wanted, out: SolvedBlock) -> Found:
    """Raises ScaleDtypeError."""
    made = [out.codes, out.values, out.errors]
    if not all(t.is_contiguous() and t.dtype == block.dtype and t.shape == block.shape for t in made) or not block.is_contiguous():
        got = [(tuple(t.shape), t.dtype) for t in made]
        raise ValueError(f"out holds {got}; it must be contiguous and like the block: {tuple(block.shape)}, {block.dtype}")
    u = upper if upper.stride(1) == 1 else upper.contiguous()
    draws = {w: numbers(2**w) for w in wanted.widths} if wanted.start == "plus_plus" else {}
    tails = wanted.tails or [(0, 0)] * len(block)
    given = [(2**w, bins(2**w), draws[w].data_ptr() if draws else 0, *tails[j]) for j, w in enumerate(wanted.widths)]
    plan, most = torch.tensor(given, dtype=torch.int64), 2 ** max(wanted.widths)
    tables = block.new_empty(len(block), most)
    kept = None if wanted.tails is None else torch.empty(block.shape, dtype=torch.bool)
    wrong = torch.zeros(1, dtype=torch.int64)
    entry = f"bitgrid_claq_block_{SUFFIX[block.dtype]}"
    sizes = (u.stride(0), plan, *block.shape, STEPS, TYPES[wanted.dtype], most)
    native.call("claq_block", entry, block, u, *sizes, *made, tables, 0 if kept is None else kept, wrong)
    if int(wrong):
        raise ScaleDtypeError(REASONS[int(wrong) - 1])
    return Found(tables.to(wanted.dtype), kept, None)
