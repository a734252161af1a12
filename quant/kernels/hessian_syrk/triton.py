"""The lower triangle in Triton: half the products."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quant.kernels.on_triton import interpreted, unavailable

__all__ = ["add", "finished", "unavailable"]

PROMOTE = 16
"""Steps to a partial sum."""


def shape(dtype: torch.dtype, capability: int) -> tuple[int, int, int, int]:
    """Channels of a tile, tokens of a step, and warps and stages with which both sums of a tile are held without spilling."""
    if dtype is torch.float32:
        return 64, 16, 8, 2
    return (128, 64, 8, 3) if capability >= 9 else (64, 64, 4, 3)


def add(total: Tensor, x: Tensor) -> None:
    """float16 and bfloat16 as they are, with float32 sums; other types as float32, without tensor cores."""
    from quant.kernels.hessian_syrk.program import add_lower

    # The interpreter has no products of bfloat16.
    whole = x.dtype in (torch.float16, torch.bfloat16) and not (interpreted() and x.dtype is torch.bfloat16)
    given = (x if whole else x.float()).to(total.device).contiguous()
    sequences, length, k = given.shape
    tile, step, warps, stages = (32, 16, 4, 1) if interpreted() else shape(given.dtype, torch.cuda.get_device_capability(given.device)[0])
    programs = _lower_tiles(-(-k // tile), total.device)
    add_lower[(programs.shape[0],)](
        total, given, programs, sequences, length, k,
        TILE=tile, STEP=step, PROMOTE=PROMOTE, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip


@cache
def _lower_tiles(count: int, device: torch.device) -> Tensor:
    """int32 `[count (count + 1) / 2, 2]`."""
    return torch.tril_indices(count, count).T.to(torch.int32).contiguous().to(device)


def finished(total: Tensor) -> Tensor:
    return total.tril() + total.tril(-1).T
