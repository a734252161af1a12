"""Quantization with gradients: rounding passes them on unchanged (Bengio et al. 2013, arXiv 1308.3432), all else has its own.

Values are exactly those of `quant.affine`, `quant.grids` and `quant.activation`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.activation import fake_quantize_activation
from quant.affine import Affine, ZeroKind
from quant.grids import GRIDS, Grid, affine_of
from quant.scheme import ActivationScheme, Granularity


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` to the last bit, with the gradient of `value`."""
    return rounded.detach() + (value - value.detach())


def scaled_limits(g: Grid, groups: Tensor, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """The grid's range `[..., 1]` of values `[..., g]` whose least and greatest value count `low` and `high` times (OmniQuant, eq. 2)."""
    ends = torch.cat([groups.amin(-1, keepdim=True) * low, groups.amax(-1, keepdim=True) * high], -1)
    return g.limits(ends)


def affine_through(g: Grid, low: Tensor, high: Tensor, bits: int, scale_dtype: torch.dtype) -> Affine:
    """As `quant.grids.affine_of`, with gradients for the range."""
    return affine_of(g, low, high, bits, scale_dtype, through)


def round_through(affine: Affine, w: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """As `affine.round`, with gradients for w, scale, zero, and the `offset` (in steps) that is added before rounding."""
    if affine.kind is ZeroKind.MINIMUM:
        steps = ((w - affine.zero) / torch.where(affine.scale == 0, 1.0, affine.scale) + offset).clamp(0, affine.top)
        return affine.decode(through(steps, steps.round()))
    if affine.kind is ZeroKind.FLOAT:
        steps = w / affine.scale + affine.zero + offset
        return affine.decode(through(steps, steps.round()).clamp(0, affine.top))
    steps = w / affine.scale + offset
    return affine.decode((through(steps, steps.round()) + affine.zero).clamp(0, affine.top))


def activation_through(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """As `quant.activation.fake_quantize_activation` with dynamic ranges, with gradients. `[..., K]`; one range per tensor is one
    per sequence of `[S, T, K]`. Number formats besides integers, and kept outliers, pass gradients on unchanged."""
    if not x.numel():
        return x
    if scheme.number != "int" or scheme.outlier_threshold is not None:
        return through(x, fake_quantize_activation(x, scheme))
    g = GRIDS["absmax" if scheme.symmetric else "omni"]
    rows = x if scheme.granularity is Granularity.TOKEN else x.reshape(x.shape[0] if x.dim() > 2 else 1, -1)
    low, high = g.limits(rows * scheme.clip)
    return round_through(affine_through(g, low, high, scheme.bits, rows.dtype), rows).view(x.shape)
