"""Factors of damped Hessians, for methods with error feedback. Whoever keeps them is asked for them (`provided_factors`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from quant.during import during
from quant.errors import SingularHessianError


def revive_dead(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with H_jj = 1 where it was 0 (inputs that never fired), and the mask `[K]` of those columns."""
    dead = hessian.diagonal() == 0
    revived = hessian.clone()
    revived.diagonal().masked_fill_(dead, 1)
    return revived, dead


def damping_ladder(damp: float) -> list[float]:
    """Fractions of mean(diag H) to try in turn: the one asked for, then ten times more each, up to 1."""
    ladder = [damp]
    step = max(10 * damp, 1e-4)
    while step < 1:
        ladder.append(step)
        step *= 10
    return [*ladder, 1.0] if damp < 1 else ladder


def first_factor(hessian: Tensor, damp: float, factor: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, float]:
    """`factor(H + d I)` for the first d of the ladder for which there is one and it is finite, and the fraction d / mean(diag H).

    Raises SingularHessianError where there is none for the whole ladder."""
    mean = hessian.diagonal().mean()
    ladder = damping_ladder(damp)
    for fraction in ladder:
        damped = hessian.clone()
        damped.diagonal().add_(fraction * mean)
        found = factor(damped)
        if found is not None and bool(torch.isfinite(found).all()):
            return found, fraction
    tried = ", ".join(f"{d:g}" for d in ladder)
    raise SingularHessianError(
        f"the Hessian of shape {tuple(hessian.shape)} is singular with damping {tried}; give more, or more diverse, calibration text"
    )


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """U `[K, K]`, upper triangular with UᵀU = (H + d I)⁻¹, and the fraction d / mean(diag H) that was needed. Not to be changed in place:
    see `provided_factors`.

    One Cholesky factorization: reversing rows and columns of H gives H = R Rᵀ with R upper, and U = R⁻¹.
    Raises SingularHessianError when the whole ladder fails."""
    return _provider.get()("inverse_factor", hessian, damp, partial(first_factor, hessian, damp, _inverted))


def pull_factor(hessian: Tensor, damp: float, span: int) -> tuple[Tensor, float]:
    """P `[K, K]`, upper triangular, of spans of so many columns (the last one's are what is left), as `inverse_factor` has it.

    With H + d I = R Rᵀ, R upper, and S the columns of a span, P_SS = R_SS⁻¹ and P_<S,S = R_<S,S R_SS⁻¹: GPTQ solves a span's columns by
    P_SS once W_S + (W - Q)_<S P_<S,S stands for W_S (LDLQ's form, arXiv 2307.13304, section 3.2, of blocks). Nothing larger than a span is
    inverted; where there is one span, P = U."""
    if span >= len(hessian):
        return inverse_factor(hessian, damp)
    return _provider.get()(f"pull_factor of {span}", hessian, damp, partial(first_factor, hessian, damp, partial(_pulling, span=span)))


Make = Callable[[], tuple[Tensor, float]]
FactorProvider = Callable[[str, Tensor, float, Make], tuple[Tensor, float]]
"""(form, matrix `[K, K]`, damping, how to make its factor) ▸ what making it gives, or gave before. The form names the function that
makes it."""
_provider: ContextVar[FactorProvider] = ContextVar("provider", default=lambda form, hessian, damp, make: make())


def provided_factors(provider: FactorProvider) -> AbstractContextManager[FactorProvider]:
    """While it lasts, factors are asked for from `provider`, in this thread."""
    return during(_provider, provider)


FACTORS = 2
"""That `shared_factors` keeps: SliM-LLM makes one to choose bits and another to round."""


@contextmanager
def shared_factors() -> Iterator[None]:
    """While it lasts, the last factors are at hand, and others are asked for as before: linears that read one input have one Hessian, whose
    factor takes as long as rounding them. Comparing two matrices takes next to nothing."""
    before, last = _provider.get(), list[tuple[object, Tensor, tuple[Tensor, float]]]()

    def provide(form: str, hessian: Tensor, damp: float, make: Make) -> tuple[Tensor, float]:
        asked = (form, damp, hessian.dtype, hessian.device)
        for known, matrix, found in last:
            if known == asked and torch.equal(matrix, hessian):
                return found
        found = before(form, hessian, damp, make)
        last[:] = [*last[1 - FACTORS :], (asked, hessian, found)]
        return found

    with provided_factors(provide):
        yield


def cholesky(hessian: Tensor) -> Tensor | None:
    """L, lower triangular, of H = L Lᵀ; None where there is none."""
    lower, info = torch.linalg.cholesky_ex(hessian)
    return None if int(info) else lower


def _triangle(hessian: Tensor) -> Tensor | None:
    """R, upper triangular, of H = R Rᵀ."""
    lower = cholesky(hessian.flip(0, 1))
    return None if lower is None else lower.flip(0, 1)


def _inverted(hessian: Tensor) -> Tensor | None:
    upper = _triangle(hessian)
    return None if upper is None else _inverse(upper)


def _pulling(hessian: Tensor, span: int) -> Tensor | None:
    made = _triangle(hessian)
    if made is None:
        return None
    for start in range(0, len(made), span):
        own = slice(start, min(start + span, len(made)))
        made[own, own] = _inverse(made[own, own])
        made[:start, own] = made[:start, own] @ made[own, own]
    return made


MOST_SOLVED = {"cuda": 1024, "cpu": 256}
"""Columns of a triangle that a device's library inverts well; it takes twice as long as products of matrices for larger ones."""


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangle `[K, K]`; below its diagonal are zeros."""
    k = upper.shape[0]
    if k > MOST_SOLVED.get(upper.device.type, k):
        # [A B; 0 C]⁻¹ = [A⁻¹, -A⁻¹ B C⁻¹; 0, C⁻¹].
        h = k // 2 // 128 * 128
        made = torch.zeros_like(upper)
        made[:h, :h], made[h:, h:] = _inverse(upper[:h, :h]), _inverse(upper[h:, h:])
        torch.matmul(made[:h, :h] @ upper[:h, h:], made[h:, h:], out=made[:h, h:]).neg_()
        return made
    identity = torch.eye(k, dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse
