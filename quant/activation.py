"""Fake quantization of activations and of the key/value cache: round to the grid, return the values.

symmetric:  s = max|x| / (2^(b-1) - 1), max|x| at least 1e-5; codes -2^(b-1) .. 2^(b-1) - 1 (SmoothQuant, QuaRot)
asymmetric: s = (max - min) / (2^b - 1) in [1e-5, 1e4], z = round(-min / s); codes 0 .. 2^b - 1 (OmniQuant)
Computed in float32, returned in the type given. The input is never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.grids import GRIDS, fit
from quant.scheme import ActivationScheme, Granularity, KVScheme


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    """Each row of the last axis on its own range, times `clip` (QuaRot's clip ratio)."""
    values = x.float()
    return _affine(values * clip, bits, symmetric).round(values).to(x.dtype)


def _affine(values: Tensor, bits: int, symmetric: bool) -> Affine:
    return fit(GRIDS["absmax" if symmetric else "omni"], values, bits, torch.float32)


def fake_quantize_activation(x: Tensor, scheme: ActivationScheme, limits: tuple[float, float] | None = None) -> Tensor:
    """`[..., K]` ▸ the same shape and type. `limits` are the calibrated least and greatest value, for static schemes only.

    A dynamic range per tensor is one per sequence of `[S, T, K]`, so that results do not depend on batching."""
    if not scheme.dynamic:
        if limits is None:
            raise ValueError("static activation quantization needs calibrated limits (low, high); or set activation.dynamic=true")
        return _affine(torch.tensor(limits, device=x.device), scheme.bits, scheme.symmetric).round(x.float()).to(x.dtype)
    if limits is not None:
        raise ValueError("limits were given, but activation.dynamic=true takes ranges from the tensor at hand")
    if not x.numel():
        return x
    if scheme.granularity is Granularity.TOKEN:
        return fake_quantize(x, scheme.bits, scheme.symmetric, scheme.clip)
    sequences = x.shape[0] if x.dim() > 2 else 1
    return fake_quantize(x.reshape(sequences, -1), scheme.bits, scheme.symmetric, scheme.clip).view(x.shape)


def fake_quantize_kv(x: Tensor, scheme: KVScheme) -> Tensor:
    """Keys or values `[B, H, T, D]`, per token and head, or per `group_size` channels of it."""
    if not x.numel():
        return x
    width = scheme.group_size or x.shape[-1]
    if x.shape[-1] % width:
        raise ValueError(f"kv.group_size={width} does not divide head_dim={x.shape[-1]}; choose a divisor, or null for one group a head")
    return fake_quantize(x.reshape(*x.shape[:-1], -1, width), scheme.bits, scheme.symmetric, scheme.clip).view(x.shape)
