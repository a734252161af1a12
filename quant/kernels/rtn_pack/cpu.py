"""The groups in C++ (`quant/csrc/rtn_pack.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.grids import GRIDS, fit_unchecked, unfit_float16
from quant.kernels import native
from quant.kernels.rtn_pack import Packed, shape_of, zero_dtype

__all__ = ["rtn_pack", "unavailable"]

unavailable = partial(native.unavailable, "rtn_pack")
NUMBERS = ("g_asym", "g_sym", "awq_asym", "omni", "q_sym", "hqq", "kivi", "absmax")
"""Of the grids, as `quant/csrc/grids.h` counts them."""
BROKEN, UNFIT, CLOSE = 1, 2, 4
"""What the library tells of a group."""


def rtn_pack(
    weight: Tensor,
    grid: str,
    bits: int,
    width: int,
    scale_dtype: torch.dtype,
    codes: bool = True,
    stream: bool = True,
    mse: bool = False,
    error: bool = False,
) -> Packed:
    shape = shape_of(weight, width)
    given = weight.detach().float().contiguous()
    scale, zero = given.new_empty(shape), given.new_empty(shape)
    told = torch.empty(shape, dtype=torch.uint8)
    whole = torch.empty(given.shape, dtype=torch.uint8) if codes else None
    streamed = torch.empty((given.numel() * bits + 7) // 8, dtype=torch.uint8) if stream else None
    off = torch.empty(shape, dtype=torch.float64) if error else None

    def run(fit: bool, encode: bool) -> None:
        made = (t if t is not None else 0 for t in (whole, streamed, off))
        sizes = (NUMBERS.index(grid), bits, width, scale.numel(), int(scale_dtype is torch.float16), int(mse), int(fit), int(encode))
        if given.numel():
            native.call("rtn_pack", "bitgrid_rtn_pack", given, scale, zero, told, *made, *sizes, torch.get_num_threads())

    # A search may leave groups to torch before any code is made.
    run(True, not mse)
    if mse:
        _settle(given.view(-1, width), grid, bits, scale_dtype, scale.view(-1, 1), zero.view(-1, 1), told.view(-1))
        run(False, True)
    counts = torch.stack([(told & BROKEN != 0).sum(), (told & UNFIT != 0).sum()]).to(torch.int32)
    return Packed(whole, streamed, scale.to(scale_dtype), zero.to(zero_dtype(grid, scale_dtype)), counts, off)


def _settle(groups: Tensor, grid: str, bits: int, scale_dtype: torch.dtype, scale: Tensor, zero: Tensor, told: Tensor) -> None:
    """Groups `[G, width]` whose two least errors differ by no more than float32 sums may: the order of torch's own sums decides, so that
    the result is the reference's."""
    index = (told & CLOSE != 0).nonzero()[:, 0]
    if not len(index):
        return
    # Torch splits the sum of one row alone among threads.
    few = groups[index if len(index) > 1 or len(groups) == 1 else index.repeat(2)]
    affine = fit_unchecked(GRIDS[grid], few, bits, scale_dtype, mse=True)
    scale[index], zero[index] = affine.scale[: len(index)], affine.zero[: len(index)]
    if scale_dtype is torch.float16:
        unfit = unfit_float16(affine, few)[: len(index), 0]
        told[index] = (told[index] & ~UNFIT) | (UNFIT * unfit).to(torch.uint8)
