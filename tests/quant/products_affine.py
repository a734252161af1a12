"""Random affine tensors and inputs, and a product's error bound: what test_wq_gemv.py says of tolerances. Importing this builds nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant.affine import ZeroKind
from quant.tensors.affine import AffineTensor

U, U_BFLOAT16 = 2.0**-24, 2.0**-8


def stored(
    n: int, k: int, bits: int, group: int, kind: ZeroKind = ZeroKind.CODE, dtype: torch.dtype = torch.float16, scaled: bool = False
) -> AffineTensor:
    """Random codes; the first row has the lowest, one the highest everywhere, and one group of most others has scale 0."""
    g = torch.Generator().manual_seed(n * k + bits)
    top, groups = 2**bits - 1, k // group
    codes = torch.randint(0, top + 1, (n, k), generator=g, dtype=torch.uint8)
    codes[0], codes[n // 2] = 0, top
    scale = (torch.rand(n, groups, generator=g) + 0.5) / top
    scale[1 : n - 1 if groups > 1 else 2, groups // 2] = 0
    zero = {
        ZeroKind.CONSTANT: torch.full((n, groups), 2 ** (bits - 1), dtype=torch.uint8),
        ZeroKind.CODE: torch.randint(0, top + 1, (n, groups), generator=g, dtype=torch.uint8),
        ZeroKind.INTEGER: torch.randint(-300, 300, (n, groups), generator=g, dtype=torch.int16),
        ZeroKind.FLOAT: (top * torch.rand(n, groups, generator=g)).to(dtype),
        ZeroKind.MINIMUM: torch.randn(n, groups, generator=g).to(dtype),
    }[kind]
    inputs = (torch.rand(k, generator=g) + 0.5).to(dtype) if scaled else None
    return AffineTensor(codes, scale.to(dtype), zero, bits, kind, input_scale=inputs)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def exact(x: Tensor, tensor: AffineTensor, base: int = 0) -> tuple[Tensor, Tensor]:
    """float64 `[M, N]`: the product and A; `base` is added to codes, and taken off again."""
    codes = tensor.codes.double()
    index = torch.arange(codes.shape[1]) // tensor.group_size if tensor.g_idx is None else tensor.g_idx.long()
    scale, zero = tensor.scale.double()[:, index], tensor.zero.double()[:, index]
    minimum = tensor.kind is ZeroKind.MINIMUM
    offset = zero if minimum else -zero * scale
    values = codes * scale + zero if minimum else (codes - zero) * scale
    given = x.double() if tensor.input_scale is None else x.double() / tensor.input_scale.double()
    return given @ values.T, given.abs() @ ((codes + 2 * base) * scale.abs() + offset.abs()).T


def check(got: Tensor, x: Tensor, tensor: AffineTensor, base: int = 0) -> None:
    want, size = exact(x, tensor, base)
    error = (got.double() - want).abs()
    bound = (2 * 16 + 4 * x.shape[1] // 32 + 8) * U * size
    if got.dtype is torch.bfloat16:
        bound = bound + U_BFLOAT16 * (want.abs() + bound)
    assert got.dtype == x.dtype
    assert (error <= bound).all(), f"{float((error / bound).max())} x the bound"
    peer = (linear(x, tensor.dequantize().to(x.dtype)).double() - want).norm()
    assert error.norm() <= 2 * peer + U * size.norm(), f"{float(error.norm())}, torch {float(peer)}"
