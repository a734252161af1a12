"""A toolkit's codes, scales and zeros ▸ our stored tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.grids import check_stored, with_stored_scales
from quant.methods.base import Rounded
from quant.scheme import WeightScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.strided import StridedTensor


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
    dtype, notes = _stored_dtype(scale, zero, scheme, kind)
    return Rounded(AffineTensor.build(codes, Affine(scale, zero, scheme.bits, kind), dtype), notes=notes)


def strided(codes: Tensor, scale: Tensor, zero: Tensor, scheme: WeightScheme) -> Rounded:
    """codes `[N, K]`, scale and zero `[G]`: weight i of the row-major order belongs to group i mod G."""
    _check_codes(codes, scheme.bits)
    dtype, notes = _stored_dtype(scale, zero, scheme, ZeroKind.FLOAT)
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


def _stored_dtype(scale: Tensor, zero: Tensor, scheme: WeightScheme, kind: ZeroKind) -> tuple[torch.dtype, list[str]]:
    """The scheme's type, or float32 with a note where that type cannot hold the scales, of either sign, or zeros closely enough."""
    kept = Affine(scale.half().abs(), zero, scheme.bits, kind)

    def run(dtype: torch.dtype) -> torch.dtype:
        check_stored(kept, scale, dtype)
        return dtype

    return with_stored_scales(scheme, run)
