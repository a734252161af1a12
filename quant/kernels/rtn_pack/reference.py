"""By the grids themselves, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.grids import GRIDS, fit_unchecked, unfit_float16
from quant.kernels.rtn_pack import Packed, shape_of
from quant.tensors.packing import pack_bits


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
    groups, scale, zero, told = fitted(weight, grid, bits, width, scale_dtype, mse)
    made = encoded(weight.shape, groups, scale, zero, grid, bits, scale_dtype, codes, stream, error)
    return Packed(made.codes, made.stream, made.scale, made.zero, told, made.error)


def fitted(
    weight: Tensor, grid: str, bits: int, width: int, scale_dtype: torch.dtype, mse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups `[R, G, g]`, scale and zero `[R, G, 1]`, float32, and `told`."""
    # Of a transposed weight a view in another order: twins of `hqq_pack` read groups one after another.
    groups = weight.detach().float().contiguous().view(*shape_of(weight, width), width)
    affine = fit_unchecked(GRIDS[grid], groups, bits, scale_dtype, mse)
    broken = ~torch.isfinite(groups.sum(-1))
    unfit = unfit_float16(affine, groups) if scale_dtype is torch.float16 else torch.zeros_like(broken)
    return groups, affine.scale, affine.zero, torch.stack([broken.sum(), unfit.sum()]).to(torch.int32)


def encoded(
    shape: torch.Size, groups: Tensor, scale: Tensor, zero: Tensor, grid: str, bits: int, scale_dtype: torch.dtype,
    codes: bool = True, stream: bool = True, error: bool = False,
) -> Packed:  # fmt: skip
    """Of a weight of this shape, what `fitted` gives."""
    affine = Affine(scale, zero, bits, GRIDS[grid].zero)
    whole = affine.encode(groups).to(torch.uint8).view(shape)
    off = (affine.round(groups) - groups).double().square().sum(-1) if error else None
    stored = scale[..., 0].to(scale_dtype).contiguous(), zero[..., 0].to(GRIDS[grid].zero.dtype(scale_dtype)).contiguous()
    none = torch.zeros(2, dtype=torch.int32, device=groups.device)
    return Packed(whole if codes else None, pack_bits(whole, bits) if stream else None, *stored, none, off)
