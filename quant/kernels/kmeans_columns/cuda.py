"""k-means of columns in CUDA C++ (`quant/csrc/kmeans_columns.cu`): a thread block for each column, nothing for the host to wait for.

Float32 columns (and shorter types) of up to MOST_ROWS values, MOST_WEIGHED with weights, stay on the chip, where it has the shared memory
for them. Others are sorted by torch before, and their sums lie in device memory: slower, the same steps. Torch's twin does what finds no
room for a partition's table of costs either (20 centres and more on a device with 99 KB), and the record says so."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import kernel, on_cuda
from quant.kernels.kmeans_columns import STEPS, SUFFIX, bins, check, draws_on, known, trials, weights_of

THREADS, ITEMS = 512, (9, 17, 23)
"""Of a block; values of a thread."""
MOST_ROWS, MOST_WEIGHED = 23 * THREADS, 17 * THREADS
STATIC, SORTING = 20 * 1024, 1024
"""Bytes of shared memory at most: what a kernel always has; what sorting takes beside 4 for each value of a thread."""
TOGETHER = 528
"""Columns that have room for sums at a time: four for each of an H200's multiprocessors."""

unavailable = partial(on_cuda.unavailable, "kmeans_columns")


def kmeans(columns: Tensor, k: int, start: str = "partition", weights: Tensor | None = None) -> Tensor:
    """`[C, N]` ▸ centres `[C, k]`."""
    check(k, start)
    x = known(columns)
    n, w = x.shape[1], None if weights is None else weights_of(x, weights)
    w = w if w is None or w.stride(1) == 1 else w.contiguous()
    most = on_cuda.shared_memory(x.device)
    if STATIC + _table(k, start) > most:
        made: Tensor = kernel("kmeans_columns", "torch", x.device).run.kmeans(columns, k, start, weights)
        return made
    centres = x.new_empty(x.shape[0], k)
    given = draws_on(k, x.device) if start == "plus_plus" else 0
    short = x.dtype is torch.float32 and n <= (MOST_ROWS if w is None else MOST_WEIGHED)
    if short and shared_bytes(n, k, start, w is not None) <= most:
        _fit(x, 0, w, 0, k, given, 0, 0, centres)
    else:
        # Running sums; of each value the distance and itself, in whole shares of the threads; and running sums of weights.
        stride = n + 1 + 2 * THREADS * -(-n // THREADS) + (0 if w is None else n + 1)
        scratch = torch.empty(min(TOGETHER, x.shape[0]), stride, dtype=torch.float64, device=x.device)
        for at in range(0, len(x), TOGETHER):
            own = slice(at, at + TOGETHER)
            ordered, order = x[own].sort(dim=1, stable=w is not None)
            beside = 0 if w is None else w[own].gather(1, order)
            _fit(x[own], ordered, None if w is None else w[own], beside, k, given, scratch, stride, centres[own])
    return centres.to(columns.dtype)


def shared_bytes(n: int, k: int, start: str, weighed: bool = False) -> int:
    """That a column of n <= MOST_ROWS values asks for to stay on the chip, at most."""
    values, sums = 4 * THREADS * next(i for i in ITEMS if n <= i * THREADS), 8 * (n + 1)
    return STATIC + values + max((sums if weighed else 0) + max(sums, _table(k, start)), values + SORTING)


def _table(k: int, start: str) -> int:
    """Bytes of dynamic programming's costs: of every run of bins."""
    side = bins(k) + 1
    return 4 * side * (side + 1) if start == "partition" and bins(k) > k else 0


def nearest(columns: Tensor, centres: Tensor) -> Tensor:
    """uint8 `[C, N]`."""
    x = known(columns)
    c = centres.to(x.dtype).contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    on_cuda.call("kmeans_columns", f"bitgrid_nearest_{SUFFIX[x.dtype]}", x, *x.shape, c, c.shape[1], codes)
    return codes


def _fit(
    x: Tensor, ordered: Tensor | int, w: Tensor | None, beside: Tensor | int, k: int,
    given: Tensor | int, scratch: Tensor | int, stride: int, centres: Tensor,
) -> None:  # fmt: skip
    weighing = (0, 0, 0) if w is None else (w, w.stride(0), beside)
    sizes = (*x.shape, k, bins(k), STEPS, trials(k))
    on_cuda.call("kmeans_columns", f"bitgrid_kmeans_{SUFFIX[x.dtype]}", x, ordered, *weighing, *sizes, given, scratch, stride, centres)
