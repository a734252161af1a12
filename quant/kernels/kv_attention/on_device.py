"""KIVI's cache written by Triton: a prompt, or a token, in one launch, where torch makes dozens of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.kernels import kv_attention
from quant.kernels.kv_attention import Packed, alike, field, takes, told_one
from quant.kernels.on_triton import early, interpreted

PIECE, FEW = 16, 16
"""Words of keys, and tokens of values, at a time."""
REGISTERS = 128
"""Of a thread that appends: left to itself the compiler takes half, for more programs than there are, and spills."""


def _write_prompt(cache: Packed, keys: Tensor, values: Tensor) -> None:
    from quant.kernels.kv_attention.program_write import fill

    s, kv, n, _ = keys.shape
    given = [x.detach() if x.stride(3) == 1 else x.detach().contiguous() for x in (keys, values)]
    blocks = max(1, -(-n // cache.block))
    fill[(s * kv, blocks)](
        *given, *_parts(cache), *given[0].stride()[:3], *given[1].stride()[:3],
        n, cache.capacity // cache.block, cache.window, *cache.coded,
        **_constants(cache), PIECE=PIECE, FEW=FEW, num_warps=warps(cache.block),
    )  # fmt: skip


prepare = partial(kv_attention.prepare, write=_write_prompt)
"""As `kv_attention.prepare`, bit for bit."""


def append(cache: Packed, keys: Tensor, values: Tensor) -> None:
    """As `kv_attention.append`."""
    takes(cache, keys, values)
    if keys.shape[2] > 1:
        return kv_attention.append(cache, keys, values)
    append_one(cache, keys, values)
    return told_one(cache)


def append_one(cache: Packed, keys: Tensor, values: Tensor) -> None:
    """One token `[S, KV, 1, D]` from what stands on the device alone, keys that age included. The host is told by `told_one`."""
    if cache.arrived is None:
        raise ValueError("this cache is for reading: one that takes tokens is made by `prepare`")
    if not alike(cache, keys, values) or keys.shape[2] != 1:
        wanted = (cache.keys.shape[0], cache.heads, 1, cache.width)
        raise ValueError(f"got keys {tuple(keys.shape)} and values {tuple(values.shape)}; this cache takes {wanted} of both")
    from quant.kernels.kv_attention.program_write import append_token

    append_token[(keys.shape[0] * cache.heads,)](
        keys.detach().contiguous(), values.detach().contiguous(), *_parts(cache), cache.arrived,
        cache.capacity // cache.block, cache.window, cache.residual,
        **_constants(cache), PIECE=PIECE, num_warps=warps(cache.block), maxnreg=REGISTERS, **early(keys.device),
    )  # fmt: skip


def ages(cache: Packed) -> bool:
    """Never is a step another one."""
    return False


def warps(block: int) -> int:
    """With which nothing is spilled."""
    return 8 if block > 64 else 4


def _parts(cache: Packed) -> tuple[Tensor, ...]:
    key_ranges, value_ranges = (x.view(torch.int32) for x in (cache.key_ranges, cache.value_ranges))
    return cache.keys, key_ranges, cache.values, value_ranges, cache.window_keys, cache.window_values, cache.counts


def _constants(cache: Packed) -> dict[str, Any]:
    return {
        "KV": cache.heads,
        "D": cache.width,
        "G": cache.block,
        "KB": cache.key_bits,
        "VB": cache.value_bits,
        "KF": field(cache.key_bits),
        "VF": field(cache.value_bits),
        "KW": cache.keys.shape[4],
        "VW": cache.values.shape[3],
        "PLAIN": interpreted(),
    }
