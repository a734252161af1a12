"""The block in CUDA C++ (`quant/csrc/claq_block.cu`): float32, up to MOST_ROWS rows where the device has the shared memory for them; a
launch for each column, none of them from Python, and nothing for the host to wait for.

Other columns are rounded one by one in torch operations, with the kernel for k-means, and the record says so.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import kernel, on_cuda
from quant.kernels.claq_block import TYPES, Found, SolvedBlock, Wanted, planned
from quant.kernels.kmeans_columns import STEPS
from quant.kernels.kmeans_columns.cuda import MOST_ROWS, numbers, shared_bytes

unavailable = partial(on_cuda.unavailable, "claq_block")


def solve_block(block: Tensor, upper: Tensor, wanted: Wanted, out: SolvedBlock) -> Found:
    if not _fits(block, wanted):
        found: Found = kernel("claq_block", "torch", block.device).run.solve_block(block, upper, wanted, out)
        return found
    u = upper if upper.stride(1) == 1 else upper.contiguous()
    plan = planned(block, wanted, out, lambda k: numbers(k, block.device))
    most = 2 ** max(wanted.widths)
    tables = block.new_empty(len(block), most)
    kept = None if wanted.tails is None else torch.empty(block.shape, dtype=torch.bool, device=block.device)
    wrong = torch.zeros(2, dtype=torch.bool, device=block.device)
    sizes = (u.stride(0), plan.data_ptr(), *block.shape, STEPS, TYPES[wanted.dtype], most)
    given, kept_at = (0 if t is None else t for t in (wanted.centres, kept))
    made = (out.codes, out.values, out.errors, tables, kept_at, wrong)
    on_cuda.call("claq_block", "bitgrid_claq_block", block, u, *sizes, given, *made)
    return Found(tables.to(wanted.dtype), kept, wrong)


def _fits(block: Tensor, wanted: Wanted) -> bool:
    n = block.shape[1]
    if block.dtype is not torch.float32 or n > MOST_ROWS:
        return False
    # What is not fitted has no table of costs.
    start = wanted.start if wanted.centres is None else "plus_plus"
    return max(shared_bytes(n, 2**width, start) for width in wanted.widths) <= on_cuda.shared_memory(block.device)
