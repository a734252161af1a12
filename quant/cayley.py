"""Gradient steps on orthonormal matrices by the Cayley transform (Li, Fuxin, Todorovic 2020, arXiv 2002.01113)."""

from __future__ import annotations

import torch
from torch import Tensor

FIXED_POINT_STEPS = 5


def cayley_step(r: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One descent step from R `[n, n]`, orthonormal, with the loss's gradient G in R; a matrix near the orthonormal ones.

    With M = -Gᵀ R and A the antisymmetric part of M - Rᵀ(R M)/2, twice: Y = (I - τ/2 A)⁻¹ (I + τ/2 A) Rᵀ by five steps of the fixed
    point Y ▸ Rᵀ + τ/2 A (Rᵀ + Y) from Rᵀ - τ Gᵀ, τ = min(lr, 1 / ‖A‖₁), so that the steps contract. The result is Yᵀ. What the
    fixed point leaves of orthonormality is to be mended by `orthonormal` before the matrix is used."""
    r = r / r.norm(dim=1, keepdim=True)
    m = -gradient.T @ r
    w = m - 0.5 * (r.T @ (r @ m))
    a = w - w.T
    tau = min(lr, 1 / (float(a.abs().sum(0).max()) + 1e-8))
    y = r.T - tau * gradient.T
    for _ in range(FIXED_POINT_STEPS):
        y = r.T + (tau / 2) * a @ (r.T + y)
    return y.T


def orthonormal(r: Tensor) -> Tensor:
    """The orthonormal factor of R `[n, n]`'s QR decomposition with the signs of R kept: R itself, up to rounding, where R is
    orthonormal."""
    q, upper = torch.linalg.qr(r)
    signed: Tensor = q * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q)
    return signed
