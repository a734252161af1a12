"""Cayley steps descend and stay orthonormal; the best iterate is used, the start included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.cayley import cayley_step, orthonormal
from quant.errors import NonFiniteError
from quant.methods.base import Linear, ModelShape, Rotation
from quant.methods.learned_rotation import LearnedRotation

SHAPE = ModelShape(hidden=16, inner=24, heads=4, head_dim=4, blocks=2)


def matrix(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def distance(r: Tensor) -> float:
    return float((r @ r.T - torch.eye(len(r), dtype=r.dtype)).abs().max())


def test_a_small_step_is_the_cayley_transform_of_the_projected_gradient() -> None:
    """Reference: Y = (I - τ/2 A)⁻¹ (I + τ/2 A) Rᵀ solved exactly; five contractions by τ/2 ‖A‖ leave (τ/2 ‖A‖)^6 of the first guess."""
    r, g = matrix(12), torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m = -g.T @ r
    a = 0.5 * (m - m.T)
    tau, eye = 1e-3, torch.eye(12, dtype=torch.float64)
    want = torch.linalg.solve(eye - tau / 2 * a, (eye + tau / 2 * a) @ r.T).T
    bound = (tau / 2 * float(torch.linalg.matrix_norm(a, 2))) ** 5 * 2 * tau * float(g.norm())
    assert float((cayley_step(r, g, tau) - want).norm()) < max(bound, 1e-13)


def test_steps_stay_near_orthonormal_matrices_and_qr_mends_the_rest() -> None:
    """The specification measured up to 5e-3 after 20 steps of size 1.5 in float32."""
    r, target = matrix(16).float(), matrix(16, 1).float()
    for _ in range(20):
        r = cayley_step(r, 2 * (r - target), 1.5)
    assert distance(r) < 2e-2
    assert distance(orthonormal(r.double())) < 1e-13
    assert float((orthonormal(r) - r).abs().max()) < 2e-2


def test_orthonormal_leaves_orthonormal_matrices_as_they_are() -> None:
    torch.testing.assert_close(orthonormal(matrix(9)), matrix(9), rtol=0, atol=1e-14)


def test_steps_descend() -> None:
    """On tr(Rᵀ C R D) whose minimum over rotations pairs the eigenvalues of C and D in opposite orders."""
    c, d = torch.arange(8.0).diag(), torch.arange(8.0).diag()
    r = matrix(8).float()
    for _ in range(500):
        r = cayley_step(r, 2 * c @ r @ d, 0.02)
    best = float((torch.arange(8.0) * torch.arange(7.0, -1, -1)).sum())
    assert float((r.T @ c @ r @ d).trace()) == pytest.approx(best, rel=0.05)


def search(method: LearnedRotation, sign: float = 1.0, seed: int = 0) -> tuple[Rotation, list[float]]:
    target, small = matrix(16, 5).float(), matrix(4, 6).float()
    target = target * torch.sign(torch.det(target))
    made: list[float] = []

    def loss(rotation: Rotation, i: int) -> Tensor:
        value = (rotation.residual - target).square().sum() + sum((v - small).square().sum() for v in rotation.values)
        made.append(float(value.detach()))
        return sign * value

    return method.rotation(SHAPE, Linear(seed=seed).generator(), loss), made


def test_the_best_iterate_is_used_and_is_orthonormal_in_float64() -> None:
    got, _ = search(LearnedRotation(steps=60, lr=0.1, checked=1))
    losses = got.details["losses"]
    assert len(losses) == 7
    assert min(losses) < 0.9 * losses[0]
    assert got.details["best"] == losses.index(min(losses))
    assert all(m.dtype is torch.float64 and distance(m) < 1e-13 for m in (got.residual, *got.values))
    target = matrix(16, 5) * torch.sign(torch.det(matrix(16, 5)))
    end = float((got.residual - target).square().sum() + sum((v - matrix(4, 6)).square().sum() for v in got.values))
    assert end == pytest.approx(min(losses), rel=1e-4)


def test_a_search_that_gains_nothing_returns_the_start_and_says_so() -> None:
    def loss(rotation: Rotation, i: int) -> Tensor:
        return (rotation.residual * 0).sum() + 3

    method = LearnedRotation(steps=4, checked=1, check_every=2)
    got = method.rotation(SHAPE, Linear(seed=1).generator(), loss)
    assert got.notes == ["no step was better than the start (loss 3): the random rotation is used"]
    start = LearnedRotation(steps=0).rotation(SHAPE, Linear(seed=1).generator(), loss)
    torch.testing.assert_close(got.residual, start.residual)
    assert (start.heads, start.down, start.keys) == (0, 24, 4)


def test_losses_that_are_not_finite_are_an_error_at_the_start_and_a_note_later() -> None:
    def broken(rotation: Rotation, i: int) -> Tensor:
        return rotation.residual.sum() * torch.nan

    with pytest.raises(NonFiniteError, match="the loss of the random rotation is nan"):
        LearnedRotation(steps=1, checked=1).rotation(SHAPE, Linear().generator(), broken)

    def steep(rotation: Rotation, i: int) -> Tensor:
        # |x - x| has no finite slope through a square root.
        return (rotation.residual - rotation.residual.detach()).abs().sqrt().sum() + rotation.values[0].sum()

    got = LearnedRotation(steps=2, checked=1, check_every=1).rotation(SHAPE, Linear().generator(), steep)
    assert "2 steps of single matrices were left out: their gradient was not finite" in got.notes
    assert distance(got.residual) < 1e-13


def test_the_same_seed_gives_the_same_rotation() -> None:
    method = LearnedRotation(steps=5, lr=0.1, checked=1)
    a, b, c = (search(method, seed=s)[0].residual for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("params", "says"), [({"steps": -1}, "steps=-1 is not .* a whole number from 0"), ({"lr": 0.0}, "lr=0.0 is not .* a number above 0")]
)
def test_wrong_parameters_say_what_is_allowed(params: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LearnedRotation(**params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give the model's loss"):
        LearnedRotation().rotation(SHAPE, torch.Generator())
