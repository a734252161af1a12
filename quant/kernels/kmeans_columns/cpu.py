"""k-means of columns in C++ (`quant/csrc/kmeans_columns.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.kmeans_columns import STEPS, SUFFIX, bins, check, draws_on, known, weights_of

unavailable = partial(native.unavailable, "kmeans_columns")


def kmeans(columns: Tensor, k: int, start: str = "partition", weights: Tensor | None = None) -> Tensor:
    """`[C, N]` ▸ centres `[C, k]`."""
    check(k, start)
    x = known(columns)
    centres = x.new_empty(x.shape[0], k)
    given = draws_on(k, x.device) if start == "plus_plus" else 0
    w = None if weights is None else weights_of(x, weights)
    w = w if w is None or w.stride(1) == 1 else w.contiguous()
    weighing = (0, 0) if w is None else (w, w.stride(0))
    _call("kmeans", x, *weighing, *x.shape, k, bins(k), STEPS, _threads(x), given, centres)
    return centres.to(columns.dtype)


def nearest(columns: Tensor, centres: Tensor) -> Tensor:
    """uint8 `[C, N]`."""
    x = known(columns)
    c = centres.to(x.dtype).contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    _call("nearest", x, *x.shape, c, c.shape[1], _threads(x), codes)
    return codes


def _threads(x: Tensor) -> int:
    return min(torch.get_num_threads(), x.shape[0])


def _call(name: str, x: Tensor, *values: Tensor | int) -> None:
    native.call("kmeans_columns", f"bitgrid_{name}_{SUFFIX[x.dtype]}", x, *values)
