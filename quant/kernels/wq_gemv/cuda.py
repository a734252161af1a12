"""The product in CUDA C++ (`quant/csrc/wq_gemv.cu`, `wq_slices.cu`), on tensor cores: one launch, that no host waits for.

Up to 16 rows of bfloat16 go through the codes at once; a row of float32, or one that an input scale divides, counts as three, and up to 4
go at once where there are more than 8, else 2. A row of out is the same bit for bit however many rows x has, but for one of bfloat16 that
is alone, with 2 bits and groups of a multiple of 128 columns, or one group: that may be multiplied in whole numbers (`wq_whole.h`). Its x
is off by up to 2^-23 of the power of two above the largest of its 128 columns, and sums are rounded as elsewhere, so that out is off by up
to that times the sum of the weight's absolute values more than it is beside others. Where an x is not finite, all of out is NaN."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.counters import counters
from quant.kernels.products import MOST_ROWS as FEW_ROWS
from quant.kernels.products import SMALL, written_to
from quant.kernels.wq_gemv import Packed
from quant.kernels.wq_gemv.fragments import ROWS, STEP, Fragments
from quant.kernels.wq_gemv.fragments import prepare as laid_out

__all__ = ["MOST_ROWS", "by_slices", "prepare", "unavailable", "values", "wq_gemv"]

MOST_ROWS = 16
"""Of x, in a call."""
EARLY = True
"""Let a product begin while the kernel before it still runs, where the device can: it fetches codes, and waits for the rest."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SLICES, WARPS = 8, 16
"""Of K, and warps of a block, where a block has a slice of K (`wq_slices.cu`): so many blocks share some rows of the weight."""
AT_ONCE = (2, 1)
"""Tiles (16 rows) that a warp may have at once; of these numbers that which leaves fewer of a block's warps without any, else the first."""
FULL = 0.8
"""Least share of a block's warps that have tiles; where it is less, the product is by blocks that have all of K."""
LEAST_STAGES = {1: 6, 2: 3}
"""Tiles at once ▸ stages that a warp's ring must have."""
FEW_STEPS = 8
"""Of a slice, up to which two tiles at once were slower than `wq_gemm`: 17.6 us on an H200 with 8192 x 8192 weights, and 17.0."""


def unavailable(device: torch.device) -> str | None:
    return on_cuda.unavailable("wq_gemv", device) or on_cuda.unavailable("wq_slices", device)


def prepare(tensor: Any) -> Fragments:
    """See `quant.kernels.wq_gemv.fragments.prepare`."""
    packed = laid_out(tensor)
    if packed.words.device.type == "cuda":
        counters(packed.words.device)
    return packed


def wq_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    made = written_to(x, packed.shape, out, MOST_ROWS)
    given = x.detach().contiguous()
    if given.data_ptr() % 16:
        given = given.clone()
    words, ranges, half = _read(packed)
    scale = 0 if packed.input_scale is None else on_cuda.aligned(packed.input_scale)[0]
    n, k = packed.shape
    at_once, blocks = by_slices(packed, x.dtype) if len(x) > FEW_ROWS else (0, 0)
    if at_once:
        tiles = -(-n // ROWS)
        sums = torch.empty(tiles * SLICES * ROWS * ROWS, dtype=torch.float32, device=x.device)
        arrived = counters(x.device).take(tiles)
        cut = (n, k, packed.groups, packed.bits, len(x), half, at_once, blocks, _early(x.device))
        on_cuda.call("wq_slices", "bitgrid_wq_slices", words, ranges, given, made, sums, arrived, *cut)
        return made
    numbers = (n, k, packed.groups, packed.bits, len(x), half, int(x.dtype is torch.bfloat16), _early(x.device))
    on_cuda.call("wq_gemv", "bitgrid_wq_gemv", words, ranges, given, scale, made, *numbers)
    return made


def by_slices(packed: Packed, dtype: torch.dtype, device: tuple[int, int] | None = None) -> tuple[int, int]:
    """Whether 9 to 16 rows of x are multiplied by blocks that have a slice of K each: tiles that a warp has at once, and blocks that share
    the rows of the weight; 0 and 0 where they are not. device: multiprocessors, and bytes of shared memory that a block may ask for, in
    place of those of the weight's device."""
    n, k = packed.shape
    width = k // packed.groups
    if packed.bits != 4 or dtype is not torch.bfloat16 or packed.input_scale is not None or (packed.groups > 1 and width % STEP):
        return 0, 0
    if n * k <= SMALL:  # 8.2 us by blocks that have all of K where these take 8.4
        return 0, 0
    multiprocessors, shared = device or _device(packed.words.device)
    tiles, blocks = -(-n // ROWS), max(multiprocessors // SLICES, 1)
    each = -(-tiles // blocks)
    shares = {at: tiles / (blocks * at * WARPS * -(-each // (at * WARPS))) for at in AT_ONCE}
    at_once = max(shares, key=lambda at: shares[at])
    # Of each step of the slice 16 rows of x and their sums; of each warp stages of codes and ranges.
    stage = at_once * ROWS * (STEP // 2 + (4 if packed.ranges.dtype is torch.float16 else 8))
    steps = -(-k // (SLICES * STEP))
    fits = steps * (2 * ROWS * STEP + 128) + LEAST_STAGES[at_once] * WARPS * stage <= shared
    pays = shares[at_once] >= FULL and (at_once == 1 or steps > FEW_STEPS)
    return (at_once, blocks) if pays and fits else (0, 0)


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.empty(packed.shape, dtype=dtype if dtype in KINDS else torch.float32, device=packed.words.device)
    words, ranges, half = _read(packed)
    n, k = packed.shape
    on_cuda.call("wq_gemv", "bitgrid_wq_values", words, ranges, made, n, k, packed.groups, packed.bits, half, KINDS[made.dtype])
    return made.to(dtype)


def _read(packed: Packed) -> tuple[Tensor, Tensor, int]:
    """Words, ranges, and 1 where those are float16. Raises ValueError for the layout of other twins, and where they are not aligned."""
    if packed.words.dim() != 3:
        raise ValueError(f"words are {tuple(packed.words.shape)}, laid out for other backends; use what this one's prepare returns")
    words, ranges = on_cuda.aligned(packed.words, packed.ranges)
    return words, ranges, int(ranges.dtype is torch.float16)


@cache
def _early(device: torch.device) -> int:
    return int(EARLY and torch.cuda.get_device_capability(device) >= (9, 0))


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may ask for."""
    return torch.cuda.get_device_properties(device).multi_processor_count, on_cuda.shared_memory(device)
