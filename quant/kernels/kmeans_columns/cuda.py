"""k-means of columns in CUDA C++ (`quant/csrc/kmeans_columns.cu`): a thread block for each column, nothing for the host to wait for.

Float32 columns (and shorter types) of up to MOST_ROWS values stay on the chip. Longer and float64 ones are sorted by torch before, and
their sums lie in device memory: slower, the same steps."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from quant.kernels import kernel, on_cuda
from quant.kernels.kmeans_columns import STEPS, bins, check, draws, trials

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
THREADS, MOST_ROWS = 512, 23 * 512
TOGETHER = 528
"""Columns that have room for sums at a time: four for each of an H200's multiprocessors."""

unavailable = partial(on_cuda.unavailable, "kmeans_columns")


def kmeans(columns: Tensor, k: int, start: str = "partition", weights: Tensor | None = None) -> Tensor:
    """`[C, N]` ▸ centres `[C, k]`; with weights by the torch twin, on the same device, and the record says so."""
    check(k, start)
    if weights is not None:
        made: Tensor = kernel("kmeans_columns", "torch", columns.device).run.kmeans(columns, k, start, weights)
        return made
    x = _known(columns)
    n = x.shape[1]
    centres = x.new_empty(x.shape[0], k)
    given = numbers(k, x.device) if start == "plus_plus" else 0
    if x.dtype is torch.float32 and n <= MOST_ROWS:
        _fit(x, 0, k, given, 0, 0, centres)
    else:
        # Running sums, and of each value the distance and itself, in whole shares of the threads.
        stride = n + 1 + 2 * THREADS * -(-n // THREADS)
        scratch = torch.empty(min(TOGETHER, x.shape[0]), stride, dtype=torch.float64, device=x.device)
        for some, out in zip(torch.split(x, TOGETHER), torch.split(centres, TOGETHER), strict=True):
            _fit(some, some.sort(dim=1).values, k, given, scratch, stride, out)
    return centres.to(columns.dtype)


def nearest(columns: Tensor, centres: Tensor) -> Tensor:
    """uint8 `[C, N]`."""
    x = _known(columns)
    c = centres.to(x.dtype).contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    on_cuda.call("kmeans_columns", f"bitgrid_nearest_{SUFFIX[x.dtype]}", x, *x.shape, c, c.shape[1], codes)
    return codes


def _fit(x: Tensor, ordered: Tensor | int, k: int, given: Tensor | int, scratch: Tensor | int, stride: int, centres: Tensor) -> None:
    function = f"bitgrid_kmeans_{SUFFIX[x.dtype]}"
    on_cuda.call("kmeans_columns", function, x, ordered, *x.shape, k, bins(k), STEPS, trials(k), given, scratch, stride, centres)


@cache
def numbers(k: int, device: torch.device) -> Tensor:
    return torch.tensor(draws(k), dtype=torch.float64, device=device)


def _known(columns: Tensor) -> Tensor:
    """Of a type the library has, row after row."""
    return (columns if columns.dtype in SUFFIX else columns.float()).detach().contiguous()
