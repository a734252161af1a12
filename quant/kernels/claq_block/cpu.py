"""The block in C++ (`quant/csrc/claq_block.cpp`), on one thread: its columns wait for each other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.kernels import native
from quant.kernels.claq_block import REASONS, TYPES, Found, SolvedBlock, Wanted, planned
from quant.kernels.kmeans_columns import STEPS, SUFFIX

unavailable = partial(native.unavailable, "claq_block")


def solve_block(block: Tensor, upper: Tensor, wanted: Wanted, out: SolvedBlock) -> Found:
    """Raises ScaleDtypeError."""
    u = upper if upper.stride(1) == 1 else upper.contiguous()
    plan, most = planned(block, wanted, out), 2 ** max(wanted.widths)
    tables = block.new_empty(len(block), most)
    kept = None if wanted.tails is None else torch.empty(block.shape, dtype=torch.bool)
    wrong = torch.zeros(1, dtype=torch.int64)
    entry = f"bitgrid_claq_block_{SUFFIX[block.dtype]}"
    sizes = (u.stride(0), plan, *block.shape, STEPS, TYPES[wanted.dtype], most)
    given, kept_at = (0 if t is None else t for t in (wanted.centres, kept))
    native.call("claq_block", entry, block, u, *sizes, given, out.codes, out.values, out.errors, tables, kept_at, wrong)
    if int(wrong):
        raise ScaleDtypeError(REASONS[int(wrong) - 1])
    return Found(tables.to(wanted.dtype), kept, None)
