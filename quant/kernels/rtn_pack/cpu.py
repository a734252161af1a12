"""The groups in C++ (`quant/csrc/rtn_pack.cpp`), on torch's number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quant.grids import GRIDS, fit_unchecked, unfit_float16
from quant.kernels import native
from quant.kernels.gptq_block import GRID_NUMBERS
from quant.kernels.rtn_pack import Packed, shape_of

__all__ = ["encoded", "fitted", "rtn_pack", "unavailable"]

unavailable = partial(native.unavailable, "rtn_pack")
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
    groups, scale, zero, told = _empty(weight, width)
    made = _Made(weight.shape, scale.shape, bits, codes, stream, error)
    # A search may leave groups to torch before any code is made.
    _run(groups, scale, zero, told, made, grid, bits, scale_dtype, mse, fit=True, encode=not mse)
    if mse:
        _settle(groups.view(-1, width), grid, bits, scale_dtype, scale.view(-1, 1), zero.view(-1, 1), told.view(-1))
        _run(groups, scale, zero, told, made, grid, bits, scale_dtype, mse, fit=False, encode=True)
    return made.packed(scale, zero, grid, scale_dtype, _counts(told))


def fitted(weight: Tensor, grid: str, bits: int, width: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups `[R, G, g]`, scale and zero `[R, G, 1]`, float32, and `told`."""
    groups, scale, zero, told = _empty(weight, width)
    _run(groups, scale, zero, told, None, grid, bits, scale_dtype, False, fit=True, encode=False)
    return groups, scale, zero, _counts(told)


def encoded(
    shape: torch.Size, groups: Tensor, scale: Tensor, zero: Tensor, grid: str, bits: int, scale_dtype: torch.dtype,
    codes: bool = True, stream: bool = True, error: bool = False,
) -> Packed:  # fmt: skip
    """Of a weight of this shape, what `fitted` gives."""
    made = _Made(shape, scale.shape, bits, codes, stream, error)
    told = torch.empty(scale.shape, dtype=torch.uint8)
    _run(groups, scale.contiguous(), zero.contiguous(), told, made, grid, bits, scale_dtype, False, fit=False, encode=True)
    return made.packed(scale, zero, grid, scale_dtype, torch.zeros(2, dtype=torch.int32))


class _Made:
    """What is wanted of codes `[N, K]`, their stream and errors `[R, G, 1]`."""

    def __init__(self, shape: torch.Size, ranges: torch.Size, bits: int, codes: bool, stream: bool, error: bool) -> None:
        self.codes = torch.empty(shape, dtype=torch.uint8) if codes else None
        self.stream = torch.empty((shape.numel() * bits + 7) // 8, dtype=torch.uint8) if stream else None
        self.error = torch.empty(ranges, dtype=torch.float64) if error else None

    def packed(self, scale: Tensor, zero: Tensor, grid: str, scale_dtype: torch.dtype, told: Tensor) -> Packed:
        stored = scale[..., 0].to(scale_dtype), zero[..., 0].to(GRIDS[grid].zero.dtype(scale_dtype))
        return Packed(self.codes, self.stream, *stored, told, None if self.error is None else self.error[..., 0])


def _empty(weight: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*shape_of(weight, width), 1)
    groups = weight.detach().float().contiguous().view(*shape[:2], width)
    return groups, groups.new_empty(shape), groups.new_empty(shape), torch.empty(shape, dtype=torch.uint8)


def _run(
    groups: Tensor, scale: Tensor, zero: Tensor, told: Tensor, made: _Made | None, grid: str, bits: int, scale_dtype: torch.dtype,
    mse: bool, fit: bool, encode: bool,
) -> None:  # fmt: skip
    outputs = (0, 0, 0) if made is None else tuple(t if t is not None else 0 for t in (made.codes, made.stream, made.error))
    flags = (scale_dtype is torch.float16, mse, fit, encode)
    sizes = (GRID_NUMBERS.index(grid), bits, groups.shape[-1], scale.numel(), *map(int, flags), torch.get_num_threads())
    if groups.numel():
        native.call("rtn_pack", "bitgrid_rtn_pack", groups, scale, zero, told, *outputs, *sizes)


def _counts(told: Tensor) -> Tensor:
    return torch.stack([(told & which != 0).sum() for which in (BROKEN, UNFIT)]).to(torch.int32)


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
