"""A toolkit's codes, scales and zeros ▸ our stored tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.grids import DTYPES
from quant.methods.base import Rounded
from quant.scheme import WeightScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.strided import StridedTensor

MAX_HALF_ZERO = 512
"""Float16 zeros up to here are off by a quarter of a code at most."""


def affine(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme, *, real_zeros: bool = False) -> Rounded:
    """codes `[N, K]` in 0 .. 2^bits - 1, scale `[R, G]`, zero `[R, G]` in units of codes or None for 2^(bits-1):
    w ≈ (codes - zero) · scale. Whole zeros are stored in `bits` bits where all lie within the codes, else in 16; real ones like
    the scale. Raises ValueError for codes that are none."""
    _check_codes(codes, scheme.bits)
    if zero is None:
        kind, zero = ZeroKind.CONSTANT, torch.full_like(scale, 2 ** (scheme.bits - 1))
    elif real_zeros:
        kind = ZeroKind.FLOAT
    else:
        inside = bool(((zero >= 0) & (zero <= 2**scheme.bits - 1)).all())
        kind = ZeroKind.CODE if inside else ZeroKind.INTEGER
    dtype, notes = _stored_dtype(scale, zero if kind is ZeroKind.FLOAT else None, scheme)
    return Rounded(AffineTensor.build(codes, Affine(scale, zero, scheme.bits, kind), dtype), notes=notes)


def strided(codes: Tensor, scale: Tensor, zero: Tensor, scheme: WeightScheme) -> Rounded:
    """codes `[N, K]`, scale and zero `[G]`: weight i of the row-major order belongs to group i mod G."""
    _check_codes(codes, scheme.bits)
    dtype, notes = _stored_dtype(scale, zero, scheme)
    return Rounded(StridedTensor(codes.to(torch.uint8).contiguous(), scale.to(dtype), zero.to(dtype), scheme.bits), notes=notes)


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes `[N, K]` of a fake-quantized weight `[N, K]` = (codes - zero) · scale, with scale and zero `[R, G]`; the weight's rounding
    to its own type is rounded away."""
    width = weight.shape[1] // scale.shape[1]
    steps = (weight.float() / scale.float().repeat_interleave(width, dim=1)).round()
    offset = 2.0 ** (bits - 1) if zero is None else zero.float().repeat_interleave(width, dim=1)
    return steps + offset


def _check_codes(codes: Tensor, bits: int) -> None:
    low, high = float(codes.min()), float(codes.max())
    if low < 0 or high > 2**bits - 1 or not torch.equal(codes.float(), codes.float().round()):
        raise ValueError(f"the toolkit's codes lie in {low:g} .. {high:g}; expected whole numbers in 0 .. {2**bits - 1}")


def _stored_dtype(scale: Tensor, zero: Tensor | None, scheme: WeightScheme) -> tuple[torch.dtype, list[str]]:
    """The scheme's type, or float32 with a note where that type cannot hold the scales closely enough."""
    dtype = DTYPES[scheme.scale_dtype]
    if dtype is torch.float16:
        half = scale.half()
        # Subnormal float16 values are 2^-24 apart.
        wrong = ~torch.isfinite(half) | (half.abs() < 2.0 ** (scheme.bits - 24))
        if zero is not None:
            wrong |= ~(zero.abs() <= MAX_HALF_ZERO)
        if bool(wrong.any()):
            count = f"{int(wrong.sum())} of {wrong.numel()} scales or zeros do not fit float16"
            return torch.float32, [f"{count}; scales are stored in float32"]
    return dtype, []
