"""What methods with error feedback do before their first column: checks, dead inputs, the factor of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quant.errors import require_all_finite, require_finite
from quant.factors import inverse_factor, revive_dead
from quant.methods.base import working_dtype
from quant.statistics import Statistics

ALL_ZERO = "all inputs are always 0 on the calibration text: the Hessian counts as the identity"


@dataclass(frozen=True)
class Prepared:
    given: Tensor
    """The weight `[N, K]` as given, float64 where it was, else float32."""
    weight: Tensor
    """The same with dead inputs' columns 0."""
    upper: Tensor
    """U `[K, K]`, UᵀU = (H + d I)⁻¹."""
    damp: float
    """d / mean(diag H)."""
    notes: list[str]


def checked_hessian(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
    """H `[K, K]` as given. Raises ValueError for a missing or misshapen one, NonFiniteError for values that are not finite."""
    hessian = _hessian(name, weight, statistics)
    require_finite("weight", weight)
    require_finite("Hessian", hessian)
    return hessian


def _hessian(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
    """Its values are not looked at."""
    statistics.require(name, "hessian")
    hessian = statistics.hessian
    assert hessian is not None
    k = weight.shape[1]
    if hessian.shape != (k, k):
        raise ValueError(f"the Hessian has shape {tuple(hessian.shape)}; a weight with {k} inputs needs {(k, k)}")
    return hessian


def checked(method: str, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Weight and Hessian in the type to compute in: float64 where the weight was, else float32.

    Raises NonFiniteError, and ValueError for a missing Hessian or one of another shape."""
    hessian = checked_hessian(method, weight, statistics)
    given = weight.detach().to(working_dtype(weight))
    return given, hessian.to(given)


def checked_together(method: str, weights: Sequence[Tensor], statistics: Statistics, as_given: bool = False) -> tuple[list[Tensor], Tensor]:
    """As `checked`, of weights of one type that read one input: the Hessian is looked at once. as_given: weights keep their type."""
    given = _hessian(method, weights[0], statistics)
    for weight in weights[1:]:
        if weight.shape[1] != len(given):
            raise ValueError(f"weights that read one input have {len(given)} columns each, not {weight.shape[1]}")
    require_all_finite([("weight", weights[0]), ("Hessian", given), *(("weight", w) for w in weights[1:])])
    dtype = working_dtype(weights[0])
    place = weights[0].device
    return [w.detach() if as_given else w.detach().to(place, dtype) for w in weights], given.to(place, dtype)


def without_dead(weight: Tensor, dead: Tensor, count: int) -> tuple[Tensor, list[str]]:
    """weight `[N, K]` with 0 in the columns of inputs that are always 0 (`dead` `[K]`, `count` of them), but as it was where all are, and
    notes of it. An input that no token reached has its own note: stages give the identity for its Hessian."""
    if count == 0:
        return weight, []
    if count == len(dead):
        return weight, [ALL_ZERO]
    return weight.masked_fill(dead, 0), [f"{count} of {len(dead)} inputs are always 0 on the calibration text: their weights are set to 0"]


def damping_notes(asked: float, used: float) -> list[str]:
    """Both as fractions of mean(diag H), see `quant.factors.damping_ladder`."""
    return [] if used == asked else [f"damping {asked:g} did not make the Hessian positive definite: {used:g} was used"]


def prepare(method: str, weight: Tensor, statistics: Statistics, damp: float) -> Prepared:
    """As `checked`; raises SingularHessianError too.

    Where all inputs are 0 (H = 0), H = I counts instead of zeroing the weight."""
    given, hessian = checked(method, weight, statistics)
    h, dead = revive_dead(hessian)
    w, notes = without_dead(given, dead, int(dead.sum()))
    upper, used = inverse_factor(h, damp)
    return Prepared(given, w, upper, used, notes + damping_notes(damp, used))
