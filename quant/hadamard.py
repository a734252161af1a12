"""Hadamard matrices and their fast transform. Which orders there are: `quant.kernels.hadamard.matrices`.

Vectors are rows: `apply_hadamard(x) = x H`, `hadamard_matrix(n) = H`, both orthonormal (divided by √n). Sylvester matrices are symmetric,
most of the small ones are not: the inverse is `apply_hadamard(x, transpose=True) = x Hᵀ`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.hadamard.matrices import factors, hadamard_block, small, small_factor

__all__ = ["apply_hadamard", "hadamard_block", "hadamard_matrix", "mix", "small_factor"]


def hadamard_matrix(n: int) -> Tensor:
    """H `[n, n]`, orthonormal, float64. Raises ValueError where there is none of order n."""
    return apply_hadamard(torch.eye(n, dtype=torch.float64))


def apply_hadamard(x: Tensor, *, transpose: bool = False, normalize: bool = True) -> Tensor:
    """`[..., n]` ▸ x H (x Hᵀ with `transpose`), in the type of x: float16 and bfloat16 are computed in float32.

    n log n additions, and a product with the small factor. Without `normalize` the entries are ±1: integers stay exact integers.
    Raises ValueError where there is no matrix of order n; `hadamard_block` gives a size that works."""
    n = x.shape[-1]
    m, width = factors(n)
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # The kernel would do both parts at once, in an order of sums that is each twin's own: rotated weights are to be the same.
    y: Tensor = kernel("hadamard", device=work.device).run.transform(work.reshape(-1, width)).view(-1, m, width)
    if m > 1:
        y = torch.matmul(small(m, transpose, y.dtype, y.device), y)
    if normalize:
        y = y / math.sqrt(n)
    return y.reshape(x.shape).to(x.dtype)


def mix(x: Tensor, block: int, *, transpose: bool = False) -> Tensor:
    """An orthonormal H of order `block` (Hᵀ with `transpose`) on every `block` consecutive values of `[..., n]`; block 0: x as it is."""
    if not block:
        return x
    return apply_hadamard(x.reshape(*x.shape[:-1], -1, block), transpose=transpose).reshape(x.shape)
