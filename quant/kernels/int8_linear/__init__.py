"""`int8_linear`: activations rounded per token times a weight of integer codes, summed up as integers: out `[M, N]`.

Row i of x `[M, K]` is x̂ = (a − z_a) s_a (`quant.kernels.fake_quantize`), row j of the weight ŵ = (c − z_c) s_c, with a and c in 8 bits. So

    x̂ · ŵ = s_a s_c (Σ a c − z_c Σ a − z_a Σ (c − z_c)),

where the sums of products are exact in int32, and the terms with zeros vanish for symmetric grids. Codes of fewer bits (W4A8, W4A4) are
multiplied as 8 bits. SmoothQuant (arXiv 2211.10438, §4) and QuaRot (arXiv 2404.00456, §4) run their linears so.

Every twin has `int8_linear(x, packed, dtype=torch.float32)`, and its two halves, so that linears with the same input round it once:
- `rounded(x, packed) ▸ r`
- `multiply(r, packed, dtype=torch.float32) ▸ [M, N]`

Out is made in float32, and rounded once where another dtype is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant import kernels
from quant.accounting import size_bytes
from quant.affine import ZeroKind
from quant.kernels.fake_quantize import RowCodes
from quant.scheme import ActivationScheme, Granularity
from quant.tensors.affine import AffineTensor

MOST_COLUMNS = 2**17 - 1
"""Whose products of codes, at most 2^14 each, an int32 can hold the sum of."""


@dataclass(frozen=True)
class Packed:
    """A weight, and how activations are rounded for it."""

    codes: Tensor
    """int8 `[N, K]`: the stored codes less 2^(bits-1)."""
    scale: Tensor
    """float32 `[N]`."""
    zero: Tensor | None
    """float32 `[N]`, less 2^(bits-1) as well; None for zeros alone."""
    sums: Tensor
    """float32 `[N]`: Σ (codes − zero) over the columns."""
    bits: int
    """Of activations, as the next two."""
    symmetric: bool
    clip: float

    @property
    def bytes(self) -> int:
        """What a call reads of the weight."""
        return size_bytes(self.codes, self.scale, self.zero, self.sums)


def prepare(tensor: AffineTensor, activation: ActivationScheme) -> Packed:
    """Raises ValueError for a weight or activations that have no scale to take out of the sum."""
    reason = _unfit(tensor, activation)
    if reason is not None:
        raise ValueError(reason)
    n, k = tensor.shape
    half = 2 ** (tensor.bits - 1)
    codes = (tensor.codes.to(torch.int16) - half).to(torch.int8)
    scale, zero = (t.float().expand(n, 1)[:, 0].contiguous() for t in (tensor.scale, tensor.zero.float() - half))
    sums = (codes.sum(1, dtype=torch.int64).double() - k * zero.double()).float()
    return Packed(codes, scale, zero if zero.any() else None, sums, activation.bits, activation.symmetric, activation.clip)


def _unfit(tensor: AffineTensor, activation: ActivationScheme) -> str | None:
    if activation.number != "int" or not activation.dynamic or activation.granularity is not Granularity.TOKEN:
        return "sums of integers are for integer activations with a dynamic range per token"
    if activation.outlier_threshold is not None:
        return "activations that stay in 16 bits (activation.outlier_threshold) are in no sum of integers"
    if tensor.scale.shape[1] != 1 or tensor.g_idx is not None:
        return f"{tensor.scale.shape[1]} groups a row; a sum of integers runs over all columns, so that a row must have one scale"
    if tensor.kind is ZeroKind.MINIMUM:
        return "the zero is not in units of codes"
    if tensor.input_scale is not None:
        return "activations are divided by the weight's input scale after they are rounded"
    if tensor.shape[1] > MOST_COLUMNS:
        return f"{tensor.shape[1]} columns; an int32 holds the sum of {MOST_COLUMNS}"
    return None


def rounded(x: Tensor, packed: Packed) -> RowCodes:
    """Rows of x `[M, K]`, of any float type, in codes of the weight's activation scheme."""
    run = kernels.kernel("fake_quantize", device=x.device).run
    made: RowCodes = run.encode(x, packed.bits, packed.symmetric, packed.clip)
    return made


def scaled(sums: Tensor, rows: RowCodes, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Σ a c, int32 `[M, N]` ▸ the product `[M, N]`."""
    out = sums.float()
    if packed.zero is not None:
        added = rows.codes.sum(1, dtype=torch.int32) if rows.sums is None else rows.sums
        out.addr_(added.float(), packed.zero, alpha=-1)
    if not packed.symmetric:
        out.addr_(rows.zero[:, 0], packed.sums, alpha=-1)
    return out.mul_(rows.scale).mul_(packed.scale).to(dtype)
