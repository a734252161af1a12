"""Operation by operation, on any device."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.kernels.hqq_pack import Search, packed, steps
from quant.kernels.rtn_pack import reference as rtn

__all__ = ["hqq_pack", "step", "zeros"]


def step(w: Tensor, scale: Tensor, bits: int, p: float, zero: Tensor, beta: float) -> tuple[Tensor, float]:
    """Groups `[R, G, g]`, scale and zero `[R, G, 1]` ▸ the next zeros, and mean |W - Ŵ| before."""
    codes = Affine(scale, zero, bits, ZeroKind.FLOAT).encode(w)
    error = w - (codes - zero) * scale
    size = error.abs()
    # 0 ^ (p - 1) is infinite for p < 1, and the shrunk error 0.
    shrunk = error.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)
    return (codes - (w - shrunk) / scale).mean(-1, keepdim=True), float(size.mean())


def zeros(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, search: Search) -> tuple[Tensor, int]:
    return steps(partial(step, groups, scale, bits, search.p), zero, search)


hqq_pack = partial(packed, rtn, zeros)
