"""The searches in C++ (`quant/csrc/braq_search.cpp`), on torch's number of threads; float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from quant.kernels import native

__all__ = ["order_two_errors", "split_errors", "unavailable"]

unavailable = partial(native.unavailable, "braq_search")
COUNT_ROWS, SPLIT_ROWS = 8, 64
"""Of a tile."""


def order_two_errors(m: Tensor, counts: Sequence[int]) -> Tensor:
    return _run("bitgrid_braq_counts", m, torch.tensor(counts, dtype=torch.int64), COUNT_ROWS)


def split_errors(x: Tensor, thresholds: Tensor, skip: Tensor | None = None) -> Tensor:
    x = x if skip is None else x[:, int(skip) :]
    return _run("bitgrid_braq_splits", x, thresholds.to(x).contiguous(), SPLIT_ROWS)


def _run(function: str, x: Tensor, candidates: Tensor, rows: int) -> Tensor:
    if x.dtype is not torch.float32:
        raise ValueError(f"weights are {x.dtype}; the C++ search takes torch.float32: use backend=torch")
    given = x.contiguous()
    totals = torch.empty(-(-x.shape[0] // rows), len(candidates), dtype=torch.float64)
    native.call("braq_search", function, given, candidates, totals, *x.shape, len(candidates), torch.get_num_threads())
    return totals.sum(0)
