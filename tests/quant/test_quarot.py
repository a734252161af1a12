"""Rotations are orthonormal, drawn from their seed alone, and carry statistics over exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.methods.base import Linear, ModelShape
from quant.methods.quarot import Quarot
from quant.statistics import collect

SHAPE = ModelShape(hidden=96, inner=172, heads=12, head_dim=8, blocks=3)


def generator(seed: int) -> torch.Generator:
    return Linear("quarot", seed).generator()


def orthonormal(r: Tensor) -> bool:
    return float((r.T @ r - torch.eye(len(r), dtype=r.dtype)).abs().max()) < 1e-13


@pytest.mark.parametrize("hidden", [8, 96, 112, 28 * 4, 14, 9])
def test_rotations_are_orthonormal_in_float64(hidden: int) -> None:
    made = Quarot().rotation(ModelShape(hidden, 172, 12, 8, 3), generator(0))
    assert made.residual.dtype is torch.float64
    assert orthonormal(made.residual)
    assert len(made.values) == 3
    assert all(orthonormal(v) for v in made.values)


def test_every_entry_of_a_full_rotation_has_one_size() -> None:
    """So that a single outlier channel spreads evenly over all of them."""
    r = Quarot().rotation(SHAPE, generator(0)).residual
    torch.testing.assert_close(r.abs(), torch.full_like(r, 96**-0.5), rtol=1e-12, atol=0)


def test_signs_come_from_the_seed() -> None:
    a, b, c = (Quarot().rotation(SHAPE, generator(seed)).residual for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_sizes_without_a_hadamard_matrix_are_mixed_in_blocks_and_noted() -> None:
    made = Quarot().rotation(ModelShape(14, 12 * 9, 6, 8, 1), generator(0))
    assert (made.heads, made.down, made.keys) == (2, 108, 8)
    assert made.notes == [
        "no Hadamard matrix of order 14 (hidden) is known: 7 blocks of 2 are mixed",
        "no Hadamard matrix of order 6 (heads) is known: 3 blocks of 2 are mixed",
    ]


def test_what_happens_at_run_time_can_be_left_out() -> None:
    made = Quarot(online=False, qk=False).rotation(SHAPE, generator(0))
    assert (made.heads, made.down, made.keys) == (0, 0, 0)


def test_mapped_statistics_are_those_of_mapped_inputs() -> None:
    """H is summed in float32: each entry within T · 2^-24 of the sum of |x x|."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 30, 12, generator=g)
    m = torch.randn(12, 12, generator=g, dtype=torch.float64)
    got = collect(x, frozenset({"hessian", "samples", "absmax"})).mapped(lambda v: v @ m)
    y = (x.double() @ m).reshape(-1, 12)
    want = (2 / 4) * y.T @ y
    assert got.hessian is not None
    assert got.samples is not None
    assert got.absmax is None
    bound = 120 * 2**-24 * (2 / 4) * (x.double().abs() @ m.abs()).reshape(-1, 12).square().sum(0).max()
    assert float((got.hessian - want).abs().max()) < float(bound)
    torch.testing.assert_close(got.samples, y.view(4, 30, 12).float())
