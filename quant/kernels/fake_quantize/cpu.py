"""The rows in C++ (`quant/csrc/fake_quantize.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.fake_quantize import RowCodes

__all__ = ["encode", "fake_quantize", "unavailable"]

unavailable = partial(native.unavailable, "fake_quantize")


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    values = x.detach().float().contiguous()
    out = torch.empty_like(values)
    _run("bitgrid_fake_quantize", values, [out], bits, symmetric, clip)
    return out.to(x.dtype)


def encode(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> RowCodes:
    values = x.detach().float().contiguous()
    scale, zero = (values.new_empty(len(values), 1) for _ in range(2))
    codes = torch.empty(values.shape, dtype=torch.int8)
    _run("bitgrid_encode_rows", values, [codes, scale, zero], bits, symmetric, clip)
    return RowCodes(codes, scale, zero)


def _run(function: str, values: Tensor, made: list[Tensor], bits: int, symmetric: bool, clip: float) -> None:
    if values.numel():
        ratio = torch.tensor([clip], dtype=torch.float32)
        native.call("fake_quantize", function, values, *made, ratio, *values.shape, bits, int(symmetric), torch.get_num_threads())
