"""Fake quantization of activations and of the key/value cache: round to the grid, return the values.

symmetric:  s = max|x| / (2^(b-1) - 1), max|x| at least 1e-5; codes -2^(b-1) .. 2^(b-1) - 1 (SmoothQuant, QuaRot)
asymmetric: s = (max - min) / (2^b - 1) in [1e-5, 1e4], z = round(-min / s); codes 0 .. 2^b - 1 (OmniQuant)
Number formats besides integers (`quant.number_formats`): one scale per token (fp8), or per block of 32 or 16 inputs of a token, the
last block being smaller where they do not divide; nvfp4's second scale is one per token.
outlier_threshold (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339): inputs with |x| ≥ threshold anywhere in the sequence stay as
they are in all its tokens; the range of a token is that of its values below the threshold. In the paper X is one sequence; its
code (bitsandbytes) looks at the whole batch at once, which would make results depend on batching.
Computed in float32, returned in the type given. The input is never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.grids import GRIDS, fit
from quant.kernels import kernel
from quant.number_formats import fake_per_row, number_format
from quant.scheme import NUMBERS, ActivationScheme, Granularity, KVScheme


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    """Each row of the last axis on its own range, times `clip` (QuaRot's clip ratio)."""
    run = kernel("fake_quantize", device=x.device).run
    rounded: Tensor = run.fake_quantize(x.reshape(-1, x.shape[-1]), bits, symmetric, clip)
    return rounded.view(x.shape)


def _affine(values: Tensor, bits: int, symmetric: bool) -> Affine:
    return fit(GRIDS["absmax" if symmetric else "omni"], values, bits, torch.float32)


def fake_quantize_activation(x: Tensor, scheme: ActivationScheme, limits: tuple[float, float] | None = None) -> Tensor:
    """`[..., K]` ▸ the same shape and type. `limits` are the calibrated least and greatest value, for static schemes only.

    A dynamic range per tensor is one per sequence of `[S, T, K]`, so that results do not depend on batching."""
    if not scheme.dynamic:
        if limits is None:
            raise ValueError("static activation quantization needs calibrated limits (low, high); or set activation.dynamic=true")
        if scheme.number != "int":
            return _static_floating(x, scheme.number, max(abs(limits[0]), abs(limits[1])))
        return _affine(torch.tensor(limits, device=x.device), scheme.bits, scheme.symmetric).round(x.float()).to(x.dtype)
    if limits is not None:
        raise ValueError("limits were given, but activation.dynamic=true takes ranges from the tensor at hand")
    if not x.numel():
        return x
    if scheme.outlier_threshold is not None:
        return _with_outliers(x, scheme, scheme.outlier_threshold)
    return _fake_dynamic(x, scheme)


def _fake_dynamic(x: Tensor, scheme: ActivationScheme) -> Tensor:
    if scheme.granularity is Granularity.TENSOR:
        return _fake_rows(x.reshape(x.shape[0] if x.dim() > 2 else 1, -1), scheme).view(x.shape)
    return _fake_rows(x, scheme)


def _fake_rows(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """`[..., K]`, every row of the last axis on its own range."""
    if scheme.number == "int":
        return fake_quantize(x, scheme.bits, scheme.symmetric, scheme.clip)
    k = x.shape[-1]
    block = NUMBERS[scheme.number].block or k
    rows = torch.nn.functional.pad(x.float().reshape(-1, k), (0, -k % block))
    # Every row is a tensor of its own: a format's scale per tensor is one per token.
    return fake_per_row(scheme.number, rows.view(rows.shape[0], -1, block)).view(rows.shape)[:, :k].reshape(x.shape).to(x.dtype)


def _static_floating(x: Tensor, number: str, peak: float) -> Tensor:
    element = number_format(number).element
    scale = peak / element.top if peak else 1.0
    unknown = x.isnan()  # has no code
    values = element.values().to(x.device)[element.encode(x.float().masked_fill(unknown, 0) / scale)] * scale
    return values.masked_fill(unknown, torch.nan).to(x.dtype)


def _with_outliers(x: Tensor, scheme: ActivationScheme, threshold: float) -> Tensor:
    """`[S, T, K]`, or `[T, K]` as one sequence."""
    large = x.abs() >= threshold
    kept = large.any(-2, keepdim=True)
    return torch.where(kept, x, _fake_dynamic(x.masked_fill(large, 0), scheme))


def fake_quantize_kv(x: Tensor, scheme: KVScheme) -> Tensor:
    """Keys or values `[B, H, T, D]`, per token and head, or per `group_size` channels of it."""
    if not x.numel():
        return x
    width = scheme.group_size or x.shape[-1]
    if x.shape[-1] % width:
        raise ValueError(f"kv.group_size={width} does not divide head_dim={x.shape[-1]}; choose a divisor, or null for one group a head")
    return fake_quantize(x.reshape(*x.shape[:-1], -1, width), scheme.bits, scheme.symmetric, scheme.clip).view(x.shape)
