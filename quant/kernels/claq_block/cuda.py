"""The block in CUDA C++ (`quant/csrc/claq_block.cu`): float32, up to MOST_ROWS rows where the device has the shared memory for them; a
launch for each column, none of them from Python, and nothing for the host to wait for. Linears that have one factor go in the same
launches, each on a multiprocessor of its own, which takes the time of one.

Other columns are rounded one by one in torch operations, with the kernel for k-means, and the record says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from quant.kernels import kernel, on_cuda
from quant.kernels.claq_block import TYPES, Found, Part, SolvedBlock, Wanted, planned
from quant.kernels.kmeans_columns import STEPS
from quant.kernels.kmeans_columns.cuda import ITEMS, MOST_ROWS, THREADS, shared_bytes

MOST_PARTS = 8
"""Of a call."""

unavailable = partial(on_cuda.unavailable, "claq_block")


def solve_block(block: Tensor, upper: Tensor, wanted: Wanted, out: SolvedBlock) -> Found:
    return solve_blocks([Part(block, wanted, out)], upper)[0]


def solve_blocks(parts: Sequence[Part], upper: Tensor) -> list[Found]:
    u = upper if upper.stride(1) == 1 else upper.contiguous()
    alike: dict[tuple[int, bool] | None, list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault(_kind(part), []).append(i)
    found: dict[int, Found] = {}
    for kind, own in alike.items():
        if kind is None:
            run = kernel("claq_block", "torch", upper.device).run
            found |= {i: run.solve_block(parts[i].block, u, parts[i].wanted, parts[i].out) for i in own}
            continue
        for first in range(0, len(own), MOST_PARTS):
            some = own[first : first + MOST_PARTS]
            found |= dict(zip(some, _together([parts[i] for i in some], u), strict=True))
    return [found[i] for i in range(len(parts))]


def _together(parts: list[Part], upper: Tensor) -> list[Found]:
    """Of one kind."""
    device = upper.device
    plan = torch.stack([planned(p.block, p.wanted, p.out) for p in parts])
    found, table = [], []
    for part in parts:
        block, wanted, out = part.block, part.wanted, part.out
        most = 2 ** max(wanted.widths)
        tables = block.new_empty(len(block), most)
        kept = None if wanted.tails is None else torch.empty(block.shape, dtype=torch.bool, device=device)
        wrong = torch.zeros(2, dtype=torch.bool, device=device)
        given = (block, wanted.centres, out.codes, out.values, out.errors, tables, kept, wrong)
        table.append([*(0 if t is None else t.data_ptr() for t in given), block.shape[1], most, TYPES[wanted.dtype]])
        found.append(Found(tables, kept, wrong))
    count = len(upper)
    addresses = torch.tensor(table, dtype=torch.int64)
    on_cuda.call(
        "claq_block", "bitgrid_claq_blocks", upper, upper.stride(0), addresses.data_ptr(), plan.data_ptr(), len(parts), count, STEPS
    )
    return [Found(f.tables.to(p.wanted.dtype), f.kept, f.wrong) for f, p in zip(found, parts, strict=True)]


def _kind(part: Part) -> tuple[int, bool] | None:
    """Of parts that can go together: how many values a thread has, by which sums are ordered, and whether centres are given. None for a
    part that is not taken."""
    n, wanted = part.block.shape[1], part.wanted
    if part.block.dtype is not torch.float32 or n > MOST_ROWS:
        return None
    # What is not fitted has no table of costs.
    start = wanted.start if wanted.centres is None else "plus_plus"
    if max(shared_bytes(n, 2**width, start) for width in wanted.widths) > on_cuda.shared_memory(part.block.device):
        return None
    return next(i for i in ITEMS if n <= i * THREADS), wanted.centres is not None
