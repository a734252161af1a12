"""By the grids themselves, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.grids import GRIDS, fit_unchecked, unfit_float16
from quant.kernels.rtn_pack import Packed, shape_of, zero_dtype
from quant.tensors.packing import pack_bits


def unavailable(device: torch.device) -> str | None:
    return None


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
    groups = weight.detach().float().reshape(*shape, width)
    affine = fit_unchecked(GRIDS[grid], groups, bits, scale_dtype, mse)
    broken = ~torch.isfinite(groups.sum(-1))
    unfit = unfit_float16(affine, groups) if scale_dtype is torch.float16 else torch.zeros_like(broken)
    told = torch.stack([broken.sum(), unfit.sum()]).to(torch.int32)
    whole = affine.encode(groups).to(torch.uint8).view(weight.shape)
    scale, zero = affine.scale[..., 0].to(scale_dtype), affine.zero[..., 0].to(zero_dtype(grid, scale_dtype))
    off = (affine.round(groups) - groups).double().square().sum(-1) if error else None
    return Packed(whole if codes else None, pack_bits(whole, bits) if stream else None, scale.contiguous(), zero.contiguous(), told, off)
