"""The rows in C++ (`quant/csrc/fake_quantize.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.kernels import native

__all__ = ["fake_quantize", "unavailable"]

unavailable = partial(native.unavailable, "fake_quantize")


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    values = x.detach().float().contiguous()
    out = torch.empty_like(values)
    if values.numel():
        ratio = torch.tensor([clip], dtype=torch.float32)
        native.call(
            "fake_quantize", "bitgrid_fake_quantize", values, out, ratio, *values.shape, bits, int(symmetric), torch.get_num_threads()
        )
    return out.to(x.dtype)
