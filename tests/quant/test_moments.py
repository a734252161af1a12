"""Moments equal those of a two-pass computation and of closed forms, in any order of updates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quant import moments as module
from quant.moments import FLAT, MomentSums, moments


def two_pass(x: Tensor) -> tuple[float, float, float, float]:
    """mean, σ, kurtosis, absmax / σ from central values."""
    v = x.double().flatten()
    d = v - v.mean()
    variance = (d**2).mean()
    return float(v.mean()), float(variance.sqrt()), float((d**4).mean() / variance**2), float(v.abs().max() / variance.sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 3.0, 60.0])
def test_equals_a_two_pass_computation(dtype: torch.dtype, mean: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 40, generator=g).exp() + mean).to(dtype)
    found = moments(x)
    got = (found.mean, found.std, found.kurtosis, found.absmax_sigma)
    # (mean / σ)^4 is at most 2e5 here: 16 x 2e5 x 2^-53 < 1e-9
    assert got == pytest.approx(two_pass(x), rel=1e-9)
    assert (found.count, found.absmax) == (2000, float(x.abs().max()))


def test_updates_in_pieces_and_in_chunks_count_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    sums = MomentSums()
    for row in (x[:2], x[:0], x[2:]):
        sums.update(row)
    found = sums.value()
    assert (found.mean, found.std, found.kurtosis, found.absmax_sigma) == pytest.approx(two_pass(x), rel=1e-12)


@pytest.mark.parametrize("n", [10, 1000])
def test_one_outlier_among_n_values_has_the_kurtosis_of_a_rare_event(n: int) -> None:
    x = torch.zeros(n)
    x[3] = -5.0
    p = 1 / n
    found = moments(x)
    assert found.kurtosis == pytest.approx((1 - 3 * p * (1 - p)) / (p * (1 - p)))
    assert found.absmax_sigma == pytest.approx(1 / math.sqrt(p * (1 - p)))


def test_kurtosis_is_not_excess() -> None:
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    assert moments(x).kurtosis == pytest.approx(1.8, abs=1e-3)
    quantiles = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    assert moments(quantiles).kurtosis == pytest.approx(3, abs=5e-3)
    assert moments(torch.tensor([1.0, -1.0])).kurtosis == 1


def test_no_values_and_no_spread_have_no_kurtosis() -> None:
    empty = MomentSums().value()
    assert (empty.count, empty.absmax, empty.kurtosis, empty.absmax_sigma) == (0, 0.0, None, None)
    for x in (torch.full((100,), 0.1), torch.zeros(4), torch.tensor([7.0]), 1 + math.sqrt(FLAT) / 2 * torch.tensor([1.0, -1.0])):
        found = moments(x)
        assert (found.kurtosis, found.absmax_sigma) == (None, None)
        assert found.absmax == float(x.abs().max())


def test_values_that_are_not_finite_show() -> None:
    assert math.isnan(moments(torch.tensor([1.0, math.nan])).absmax)
    assert math.isinf(moments(torch.tensor([1.0, -math.inf])).absmax)
