"""LDLQ: rounding with linear feedback from the columns already rounded, last column first (QuIP, arXiv 2307.13304, section 3.2), and its
block form (QuIP#, arXiv 2402.04396, section 4.1).

With H = M D Mᵀ, M unit (block) lower triangular and D (block) diagonal, the output error is tr(E H Eᵀ) = Σ_k tr((E M)_k D_k (E M)_kᵀ) for
E = W - Q. Rounding w_k + Σ_{j>k} e_j M_jk makes (E M)_k the error of that rounding alone. In mirrored column order this is GPTQ,
without any inverse.

Weights are `[N, K]`; everything works in the float type of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.factors import cholesky, first_factor

LAZY = 128
"""Columns between products with all later errors."""

RoundBlock = Callable[[int, Tensor], Tensor]
"""(first column, targets `[N, b]`) ▸ values `[N, b]`."""


@dataclass(frozen=True)
class Feedback:
    """M `[K, K]` and the blocks of D, `[K / b, b, b]`, of a damped Hessian."""

    unit: Tensor
    diagonal: Tensor
    damp: float
    """Fraction of mean(diag H) that was added to the diagonal."""


def feedback(hessian: Tensor, damp: float, block: int = 1) -> Feedback:
    """Block LDL decomposition of H + d I through one Cholesky factorization. `block` must divide K.

    Raises SingularHessianError when no damping of the ladder makes it positive definite."""
    k = hessian.shape[0]
    lower, fraction = first_factor(hessian, damp, cholesky)
    columns = lower.view(k, k // block, block).transpose(0, 1)  # [K / b, K, b]
    corner = torch.stack([lower[i : i + block, i : i + block] for i in range(0, k, block)])
    # X · corner = columns.
    unit = torch.linalg.solve_triangular(corner, columns, upper=False, left=False)
    return Feedback(unit.transpose(0, 1).reshape(k, k), corner @ corner.transpose(1, 2), fraction)


def solve_from_last(weight: Tensor, fed: Feedback, round_block: RoundBlock) -> tuple[Tensor, Tensor]:
    """Values `[N, K]` and the output error `[N]` of every row, the diagonal of E (H + d I) Eᵀ. The weight is not changed."""
    n, k = weight.shape
    block = fed.diagonal.shape[1]
    lazy = max(LAZY // block, 1) * block
    values, errors = torch.empty_like(weight), torch.zeros_like(weight)
    loss = weight.new_zeros(n)
    for end in range(k, 0, -lazy):
        start = max(end - lazy, 0)
        target = weight[:, start:end] + errors[:, end:] @ fed.unit[end:, start:end]
        for c in range(end - block, start - 1, -block):
            here, later = slice(c, c + block), slice(c + block, end)
            wanted = target[:, c - start : c - start + block] + errors[:, later] @ fed.unit[later, here]
            values[:, here] = round_block(c, wanted)
            errors[:, here] = weight[:, here] - values[:, here]
            left = wanted - values[:, here]
            loss += ((left @ fed.diagonal[c // block]) * left).sum(1)
    return values, loss


def coordinate_pass(weight: Tensor, values: Tensor, hessian: Tensor, round_block: RoundBlock, block: int = 1) -> Tensor:
    """One sweep of block coordinate descent, last block first: each block goes to the rounding of its best real value with all the others
    fixed, w_k + Σ_{j≠k} e_j H_jk H_kk⁻¹. On a grid of intervals (block 1) no step can raise the output error. Returns new values."""
    values = values.clone()
    errors = weight - values
    for c in range(weight.shape[1] - block, -1, -block):
        here = slice(c, c + block)
        # (E H)_k H_kk⁻¹ holds e_k itself: values + that is the optimum.
        step = torch.linalg.solve(hessian[here, here], errors @ hessian[:, here], left=False)
        values[:, here] = round_block(c, values[:, here] + step)
        errors[:, here] = weight[:, here] - values[:, here]
    return values
