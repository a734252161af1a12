"""The package bitsandbytes as a maker of codes, where it is installed: the original of LLM.int8() and NF4 (`backend: bitsandbytes`).

Loaded lazily; everything else works without it. Its CPU backend is enough.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def functional() -> Any:
    """`bitsandbytes.functional`. Raises ValueError where the package is not installed."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as e:
        raise ValueError(
            f"backend=bitsandbytes needs that package ({e}); install it with `pip install 'bitgrid[bitsandbytes]'`, or use backend=native"
        ) from e


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, K]` ▸ int8 codes `[N, K]` and float32 max |w| `[N]`."""
    codes, peak, _ = functional().int8_vectorwise_quant(weight.detach().contiguous())
    return codes, peak


def nf4_codes(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`[N, K]` with K a multiple of the block ▸ uint8 codes `[N, K]` and float32 max |w| `[N, K / block]`."""
    n, k = weight.shape
    packed, state = functional().quantize_4bit(weight.detach().contiguous(), blocksize=block, quant_type="nf4")
    pairs = packed.reshape(-1)
    return torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(n, k), state.absmax.view(n, k // block)
