"""k-means of columns in C++ (`quant/csrc/kmeans_columns.cpp`), on torch's number of threads."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from quant.kernels.kmeans_columns import STEPS, bins, check, draws
from quant.kernels.native import NoLibrary, library

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ library works on CPU tensors, not on {device}"
    found = library("kmeans_columns")
    return str(found) if isinstance(found, NoLibrary) else None


def kmeans(columns: Tensor, k: int, start: str = "partition") -> Tensor:
    """`[C, N]` ▸ centres `[C, k]`."""
    check(k, start)
    x = _known(columns)
    centres = x.new_empty(x.shape[0], k)
    given = _numbers(k).data_ptr() if start == "plus_plus" else 0
    _call("kmeans", x, x.data_ptr(), *x.shape, k, bins(k), STEPS, _threads(x), given, centres.data_ptr())
    return centres.to(columns.dtype)


def nearest(columns: Tensor, centres: Tensor) -> Tensor:
    """uint8 `[C, N]`."""
    x = _known(columns)
    c = centres.to(x.dtype).contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    _call("nearest", x, x.data_ptr(), *x.shape, c.data_ptr(), c.shape[1], _threads(x), codes.data_ptr())
    return codes


@cache
def _numbers(k: int) -> Tensor:
    return torch.tensor(draws(k), dtype=torch.float64)


def _known(columns: Tensor) -> Tensor:
    """Of a type the library has, row after row."""
    return (columns if columns.dtype in SUFFIX else columns.float()).detach().contiguous()


def _threads(x: Tensor) -> int:
    return min(torch.get_num_threads(), x.shape[0])


def _call(name: str, x: Tensor, *values: int) -> None:
    found = library("kmeans_columns")
    if isinstance(found, NoLibrary):
        raise RuntimeError(str(found))
    function = getattr(found, f"bitgrid_{name}_{SUFFIX[x.dtype]}")
    function.restype = None
    # Pointers and counts alike are passed as 64-bit integers.
    function(*map(ctypes.c_int64, values))
