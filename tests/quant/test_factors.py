"""Factors of damped Hessians: what they are of, and how often they are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import factors
from quant.errors import SingularHessianError
from quant.factors import damping_ladder, first_factor, inverse_factor, pull_factor, revive_dead, shared_factors
from tests.quant.test_gptq import problem


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 25), seed=st.integers(0, 999))
def test_the_inverses_and_its_diagonal_the_remaining_columns_denominator(k: int, seed: int) -> None:
    _, _, h = problem(1, k, seed)
    u, damp = inverse_factor(h, 0.0)
    assert damp == 0.0
    three_steps = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    torch.testing.assert_close(u, three_steps, rtol=1e-8, atol=1e-10)
    for j in range(k):
        torch.testing.assert_close(u[j, j] ** 2, torch.linalg.inv(h[j:, j:])[0, 0], rtol=1e-8, atol=0)


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 40), span=st.integers(1, 45), seed=st.integers(0, 999))
def test_spans_pull_what_errors_before_them_leave(k: int, span: int, seed: int) -> None:
    """With (W - Q) U⁻¹ = E, a span's columns are W_S - E_<S U_<S,S when all before them are solved."""
    _, _, h = problem(1, k, seed)
    (p, damp), (u, _) = pull_factor(h, 0.01, span), inverse_factor(h, 0.01)
    assert damp == 0.01
    assert torch.equal(p, p.triu())
    missed = torch.randn(3, k, dtype=h.dtype, generator=torch.Generator().manual_seed(seed))
    for start in range(0, k, span):
        own = slice(start, start + span)
        torch.testing.assert_close(p[own, own], u[own, own], rtol=1e-8, atol=1e-10)
        before = missed[:, :start]
        errors = torch.linalg.solve(u[:start, :start], before, left=False)
        torch.testing.assert_close(before @ p[:start, own], -errors @ u[:start, own], rtol=1e-8, atol=1e-10)


def test_one_span_is_the_inverse_factor() -> None:
    _, _, h = problem(1, 12, 0)
    assert torch.equal(pull_factor(h, 0.01, 12)[0], inverse_factor(h, 0.01)[0])


def test_inverting_in_halves_is_as_exact_as_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 columns: twice, at multiples of 128."""
    _, _, h = problem(1, 600, 1, tokens=900, dtype=torch.float32)
    upper = torch.linalg.cholesky(h, upper=True)
    want = torch.linalg.inv(upper.double())

    def error(made: Tensor) -> float:
        return float((made - want).norm())

    halves = factors._inverse(upper)
    monkeypatch.setattr(factors, "MOST_SOLVED", {})
    library = factors._inverse(upper)
    assert torch.equal(halves, halves.triu())
    assert not torch.equal(halves, library)
    assert error(halves) <= 2 * error(library)


def test_one_matrix_is_factored_once_while_factors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    factor = torch.linalg.cholesky_ex

    def count(matrix: Tensor) -> object:
        made.append(matrix.shape[0])
        return factor(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", count)
    _, _, h = problem(3, 8, 0)
    want = inverse_factor(h, 0.01)
    inverse_factor(h, 0.01)
    assert len(made) == 2
    with shared_factors():
        for _ in range(2):
            upper, damp = inverse_factor(h.clone(), 0.01)
            assert torch.equal(upper, want[0])
            assert damp == want[1]
        assert len(made) == 3
        assert not torch.equal(inverse_factor(h, 0.1)[0], want[0])
        assert torch.equal(inverse_factor(h, 0.01)[0], want[0])
        assert len(made) == 4, "two are kept"
        inverse_factor(2 * h, 0.01)
        inverse_factor(h.float(), 0.01)
        inverse_factor(h, 0.01)
        assert len(made) == 7
        for _ in range(2):
            pull_factor(h, 0.01, 4)
            inverse_factor(h, 0.01)
        assert len(made) == 8, "one of each form"
        pull_factor(h, 0.01, 2)
        assert len(made) == 9
    inverse_factor(h, 0.01)
    assert len(made) == 10


@pytest.mark.parametrize("factor", [inverse_factor, partial(pull_factor, span=2)], ids=["inverse", "pull"])
def test_a_hessian_that_no_damping_repairs_is_an_error(factor: Callable[[Tensor, float], object]) -> None:
    h = torch.eye(4) * 1e-3
    h[0, 1] = h[1, 0] = 10
    with pytest.raises(SingularHessianError, match=r"with damping 0\.01, 0\.1, 1"):
        factor(h, 0.01)


def test_a_factor_that_is_not_finite_is_none() -> None:
    """As one whose inverse overflows: the next damping is tried."""
    mean, asked = 3.0, list[float]()

    def factor(damped: Tensor) -> Tensor:
        asked.append(float(damped[0, 0]) - 2)
        return damped / (0 if len(asked) == 1 else 1)

    h = torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64))
    found, fraction = first_factor(h, 0.01, factor)
    assert (fraction, asked) == (0.1, pytest.approx([0.01 * mean, 0.1 * mean]))
    torch.testing.assert_close(found, h + 0.1 * mean * torch.eye(2, dtype=torch.float64))


def test_damping_ladder_ends_at_one() -> None:
    assert damping_ladder(0.01) == pytest.approx([0.01, 0.1, 1.0])
    assert damping_ladder(0.0)[0] == 0
    assert damping_ladder(0.0)[-1] == 1.0
    assert damping_ladder(3.0) == [3.0]


def test_reviving_dead_columns_leaves_the_given_hessian_alone() -> None:
    h = torch.diag(torch.tensor([2.0, 0.0]))
    revived, dead = revive_dead(h)
    assert (h[1, 1], revived[1, 1], dead.tolist()) == (0, 1, [False, True])
