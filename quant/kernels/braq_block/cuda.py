"""The block in CUDA C++ (`quant/csrc/braq_block.cu`): float32, blocks of as many columns as the searches take (`braq_search.cuda`); seven
launches, none of them from Python, and nothing for the host to wait for."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.braq_block import SPLITS, Binarized, Solve, Wanted
from quant.kernels.braq_search.cuda import COUNT_ROWS, SPLIT_ROWS, most_columns
from quant.kernels.claq_block import TYPES

unavailable = partial(on_cuda.unavailable, "braq_block")
STATE_WORDS = 135_242
"""Of the source; it refuses less."""
MOST_VALUES = 2**30
"""Of a block."""


def refuses(weight: Tensor, wanted: Wanted) -> str | None:
    """None, or why it does not round blocks of this weight."""
    (n, k), most = weight.shape, most_columns(weight.device)
    columns = min(wanted.block_size, k)
    if weight.dtype is not torch.float32:
        return f"weights are {weight.dtype}; the CUDA block takes torch.float32"
    if columns > most:
        return f"a block of {columns} columns; the CUDA block takes up to {most} on this device"
    if n * columns > MOST_VALUES:
        return f"a block of {n} x {columns} weights; the CUDA block takes up to {MOST_VALUES}"
    return None if weight.stride(1) == 1 else "the weights of a row do not lie one after another, as the CUDA block takes them"


def solver(weight: Tensor, upper: Tensor, wanted: Wanted, out: Binarized) -> Solve:
    reason = refuses(weight, wanted)
    if reason is not None:
        raise ValueError(f"{reason}: use backend=torch")
    (n, k), size = weight.shape, min(wanted.block_size, weight.shape[1])
    m, errors = weight.new_empty(n * size), weight.new_empty(n * size)
    # What tiles of rows add up to: of columns, counts and thresholds.
    most = max(size, len(wanted.counts(size)))
    totals = weight.new_empty(max(-(-n // COUNT_ROWS) * most, -(-n // SPLIT_ROWS) * SPLITS), dtype=torch.float64)
    state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=weight.device)
    step, blocks = sum(upper.stride()), out.scale.shape[1]
    flags, ranges = (out.signs, out.second, out.split, out.salient), (out.scale, out.mean)

    def solve(start: int) -> Tensor:
        columns = min(size, k - start)
        counts = wanted.counts(columns)
        sizes = (n, k, start, columns, wanted.hessian, counts[0], len(counts), TYPES[wanted.dtype])
        made = (*flags, *ranges, blocks, start // size, out.wrong, errors, m, totals, state, STATE_WORDS)
        on_cuda.call("braq_block", "bitgrid_braq_block", weight, weight.stride(0), upper, step, *sizes, *made)
        return errors[: n * columns].view(n, columns)

    return solve
