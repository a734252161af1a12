"""Fake quantization of activations and of the key/value cache: round to the grid, return the values.

symmetric:  s = max|x| / (2^(b-1) - 1), max|x| at least 1e-5; codes -2^(b-1) .. 2^(b-1) - 1 (SmoothQuant, QuaRot)
asymmetric: s = (max - min) / (2^b - 1) in [1e-5, 1e4], z = round(-min / s); codes 0 .. 2^b - 1 (OmniQuant)
Computed in float32, returned in the type given. The input is never changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quant.affine import Affine
from quant.grids import GRIDS, fit
from quant.scheme import ActivationScheme, Granularity, KVScheme


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    """Each row of the last axis on its own range, times `clip` (QuaRot's clip ratio)."""
    grid = GRIDS["absmax" if symmetric else "omni"]
    values = x.float()
    affine = fit(grid, values * clip, bits, torch.float32)
    return affine.round(values).to(x.dtype)


def fake_quantize_activation(x: Tensor, scheme: ActivationScheme, scale: Tensor | None = None) -> Tensor:
    """`[..., K]` ▸ the same shape and type. `scale` is what `StaticRange.scale` gave, for static schemes only.

    A dynamic range per tensor is one per sequence of `[S, T, K]`, so that results do not depend on batching."""
    if not scheme.dynamic:
        if scale is None:
            raise ValueError(
                "static activation quantization needs the calibrated scale; collect it with StaticRange, or set activation.dynamic=true"
            )
        return _static(x.float(), scheme, scale.to(x.device)).to(x.dtype)
    if scale is not None:
        raise ValueError("a scale was given, but activation.dynamic=true takes ranges from the tensor at hand")
    if not x.numel():
        return x
    if scheme.granularity is Granularity.TOKEN:
        return fake_quantize(x, scheme.bits, scheme.symmetric)
    sequences = x.shape[0] if x.dim() > 2 else 1
    return fake_quantize(x.reshape(sequences, -1), scheme.bits, scheme.symmetric).view(x.shape)


def fake_quantize_kv(x: Tensor, scheme: KVScheme) -> Tensor:
    """Keys or values `[B, H, T, D]`, per token and head, or per `group_size` channels of it."""
    if not x.numel():
        return x
    width = scheme.group_size or x.shape[-1]
    if x.shape[-1] % width:
        raise ValueError(f"kv.group_size={width} does not divide head_dim={x.shape[-1]}; choose a divisor, or null for one group per head")
    return fake_quantize(x.reshape(*x.shape[:-1], -1, width), scheme.bits, scheme.symmetric).view(x.shape)


class StaticRange:
    """Smallest and largest value of an input over a calibration run."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor) -> None:
        """Tokens of any shape."""
        if x.numel():
            low, high = torch.aminmax(x)
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def scale(self, scheme: ActivationScheme) -> Tensor:
        """float32 `[1]` (scale) for symmetric schemes, `[2]` (scale, zero) otherwise. Raises ValueError without values."""
        if self.low > self.high:
            raise ValueError("no activation was seen while collecting static ranges; give calibration text that reaches this input")
        affine = fit(GRIDS["absmax" if scheme.symmetric else "omni"], torch.tensor([self.low, self.high]), scheme.bits, torch.float32)
        return affine.scale if scheme.symmetric else torch.cat([affine.scale, affine.zero])


def static_range(tensors: Iterable[Tensor], scheme: ActivationScheme) -> Tensor:
    """The static scale over several tensors."""
    seen = StaticRange()
    for x in tensors:
        seen.update(x)
    return seen.scale(scheme)


def _static(x: Tensor, scheme: ActivationScheme, scale: Tensor) -> Tensor:
    expected = 1 if scheme.symmetric else 2
    if scale.numel() != expected:
        raise ValueError(f"a static scale has {scale.numel()} values; activation.symmetric={scheme.symmetric} takes {expected}")
    kind = GRIDS["absmax" if scheme.symmetric else "omni"].zero
    flat = scale.float().reshape(-1)
    zero = torch.full_like(flat[0], 2 ** (scheme.bits - 1)) if scheme.symmetric else flat[1]
    return Affine(flat[0], zero, scheme.bits, kind).round(x)
