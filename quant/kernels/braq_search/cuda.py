"""The searches in CUDA C++ (`quant/csrc/braq_search.cu`); float32, up to MOST_COLUMNS columns (255 where a block has 99 KB of shared
memory) and MOST_THRESHOLDS thresholds. Nothing for the host to wait for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from quant.kernels import on_cuda

__all__ = ["most_columns", "order_two_errors", "refuses", "split_errors", "unavailable"]

unavailable = partial(on_cuda.unavailable, "braq_search")
COUNT_ROWS, SPLIT_ROWS = 32, 16
"""Of a tile."""
MOST_COLUMNS, MOST_THRESHOLDS = 384, 1024


def most_columns(device: torch.device) -> int:
    """Of a block: a tile's values, and what the first and the last of them add up to, fill shared memory. The thresholds take less."""
    return min(MOST_COLUMNS, (on_cuda.shared_memory(device) // (4 * (COUNT_ROWS + 1)) - 2) // 3)


def refuses(x: Tensor) -> str | None:
    """None, or why it does not search blocks like this one."""
    if x.dtype is not torch.float32:
        return f"weights are {x.dtype}; the CUDA search takes torch.float32"
    most = most_columns(x.device)
    if x.shape[1] > most:
        return f"a block of {x.shape[1]} columns; the CUDA search takes up to {most} on this device"
    return None


def order_two_errors(m: Tensor, counts: Sequence[int]) -> Tensor:
    x = _known(m)
    totals = _totals(x, COUNT_ROWS, len(counts))
    on_cuda.call("braq_search", "bitgrid_braq_counts", x, _on_device(tuple(counts), x.device), totals, *x.shape, len(counts))
    return totals.sum(0)


def split_errors(x: Tensor, thresholds: Tensor, skip: Tensor | None = None) -> Tensor:
    given, limits = _known(x), thresholds.to(x).contiguous()
    if len(limits) > MOST_THRESHOLDS:
        raise ValueError(f"{len(limits)} thresholds; the CUDA search takes up to {MOST_THRESHOLDS}: use backend=torch")
    totals = _totals(given, SPLIT_ROWS, len(limits))
    on_cuda.call("braq_search", "bitgrid_braq_splits", given, limits, 0 if skip is None else skip, totals, *given.shape, len(limits))
    return totals.sum(0)


def _known(x: Tensor) -> Tensor:
    reason = refuses(x)
    if reason is not None:
        raise ValueError(f"{reason}: use backend=torch")
    return x.contiguous()


def _totals(x: Tensor, rows: int, candidates: int) -> Tensor:
    return torch.empty(-(-x.shape[0] // rows), candidates, dtype=torch.float64, device=x.device)


@cache
def _on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept: copying from the host waits for the device.
    return torch.tensor(counts, dtype=torch.int64, device=device)
