"""SpQR: outliers and statistics against plain loops, and what must hold on any data."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import quantize_linear
from quant.errors import ScaleDtypeError
from quant.methods.base import Rounded
from quant.methods.gptq import Gptq
from quant.methods.spqr import Spqr, suspects
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors import unpack
from quant.tensors.sparse import SparseTensor, TwoLevel, bits_formula


def scheme(bits: int, size: int, dtype: str = "float32", symmetric: bool = False) -> WeightScheme:
    return WeightScheme(bits, symmetric, Granularity.GROUP, size, dtype)


def problem(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weight and Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, k, generator=g, dtype=dtype) @ (torch.eye(k, dtype=dtype) + 0.3 * torch.randn(k, k, generator=g, dtype=dtype))
    return torch.randn(n, k, generator=g, dtype=dtype), 2 * x.T @ x / 300


def sparse(result: Rounded) -> SparseTensor:
    assert isinstance(result.tensor, SparseTensor)
    return result.tensor


def spqr(w: Tensor, h: Tensor, s: WeightScheme, **params: Any) -> SparseTensor:
    return sparse(Spqr(**params).quantize(w, Statistics(hessian=h), s))


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 4),
    size=st.integers(1, 7),
    bits=st.integers(2, 5),
    act_order=st.booleans(),
    round_zero=st.booleans(),
    seed=st.integers(0, 99),
)
def test_summed_errors_are_the_output_error(
    n: int, groups: int, size: int, bits: int, act_order: bool, round_zero: bool, seed: int
) -> None:
    k = groups * size
    w, h = problem(n, k, seed, torch.float64)
    method = Spqr(act_order=act_order, round_zero=round_zero, stat_rows=4)
    result = method.quantize(w, Statistics(hessian=h), scheme(bits, size))
    d = w - sparse(result).values(torch.float64)
    full = h + h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(result.details["solver_loss"], float((d @ full * d).sum()), rtol=1e-10, atol=1e-12)


def error_without(w: list[float], u: list[float], bits: int, left_out: int | None) -> float:
    """Of a group on the grid of the weights that stay; the one left out costs nothing."""
    stay = [j for j in range(len(w)) if j != left_out]
    low, high = min(w[j] for j in stay), max(w[j] for j in stay)
    step = (high - low) / (2**bits - 1)
    if step == 0:
        return 0.0
    zero = -low / step
    values = {j: (min(max(round(w[j] / step + zero), 0), 2**bits - 1) - zero) * step for j in stay}
    return sum(((values[j] - w[j]) / u[j]) ** 2 for j in stay)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 9), bits=st.integers(2, 4), ties=st.booleans(), seed=st.integers(0, 999))
def test_suspects_are_those_of_leaving_out_one_by_one(size: int, bits: int, ties: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(3, size, generator=g, dtype=torch.float64)
    if ties:
        w = w.round()
    u = torch.rand(size, generator=g, dtype=torch.float64) + 0.5
    for row in w:
        base = error_without(row.tolist(), u.tolist(), bits, None)
        gains = [base - error_without(row.tolist(), u.tolist(), bits, j) for j in range(size)]
        for threshold in (0.02, 0.1, 0.5):
            if min(abs(x - threshold) for x in gains) > 1e-9:
                assert suspects(row[None], u, bits, threshold)[0].tolist() == [x > threshold for x in gains]


@pytest.mark.parametrize("act_order", [False, True])
def test_planted_outliers_are_found_exactly(act_order: bool) -> None:
    """Uniform weights on 15 steps err by at most 1 / 15 and the coarse statistics by as much again: e² < 0.02; the threshold is 0.2
    times a variance of at least 1 / 3. Planted weights err by 7."""
    n, k, size = 32, 64, 16
    g = torch.Generator().manual_seed(0)
    w = 2 * torch.rand(n, k, generator=g) - 1
    planted = {(1, 3), (5, 17), (5, 40), (9, 3), (30, 63), (16, 31)}  # one at most per row and group of columns
    for i, j in planted:
        w[i, j] = 8.0 if (i + j) % 2 else -8.0
    h = torch.diag(torch.linspace(1, 1.2, k))
    tensor = spqr(w, h, scheme(4, k if act_order else size), act_order=act_order)
    assert set(zip(tensor.outlier_rows.tolist(), tensor.outlier_columns.tolist(), strict=True)) == planted
    assert all(float(tensor.dequantize()[i, j]) == float(w[i, j]) for i, j in planted)
    assert tensor.outlier_share == 6 / (n * k)


def test_the_threshold_is_the_mean_of_variance_over_u() -> None:
    w, h = problem(9, 12, 1, torch.float64)
    result = Spqr(act_order=False, damp=0.1).quantize(w, Statistics(hessian=h), scheme(3, 4))
    full = h + 0.1 * h.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    u2 = [float(torch.linalg.inv(full[j:, j:])[0, 0]) for j in range(12)]
    want = 0.2 * sum(float(((w[:, j] - w[:, j].mean()) ** 2).sum()) / 8 / u2[j] for j in range(12)) / 12
    assert result.details["threshold"] == pytest.approx(want, rel=1e-9)


def test_an_infinite_threshold_keeps_nothing_and_zero_all() -> None:
    w, h = problem(8, 32)
    assert spqr(w, h, scheme(3, 16), outlier_threshold=math.inf).outlier_values.numel() == 0
    exact = spqr(w, h, scheme(3, 16), outlier_threshold=0.0)
    assert torch.equal(exact.dequantize(), w)


def test_fewer_outliers_with_a_higher_threshold_and_less_error_with_more_of_them() -> None:
    w, h = problem(32, 64)
    w[torch.rand(32, 64, generator=torch.Generator().manual_seed(1)) < 0.02] *= 8
    results = [Spqr(outlier_threshold=t).quantize(w, Statistics(hessian=h), scheme(3, 16)) for t in (0.1, 0.2, 1.0, math.inf)]
    shares = [r.details["outlier_share"] for r in results]
    assert shares == sorted(shares, reverse=True)
    assert results[1].details["solver_loss"] < results[3].details["solver_loss"]


def test_it_halves_the_error_of_gptq_for_a_tenth_more_bits_where_weights_have_outliers() -> None:
    w, h = problem(64, 128)
    w[torch.rand(64, 128, generator=torch.Generator().manual_seed(1)) < 0.01] *= 10

    def error(q: Tensor) -> float:
        return float(((q - w) @ h * (q - w)).sum())

    mine = spqr(w, h, scheme(3, 16, "float16"), act_order=False, damp=0.01)
    other = Gptq().quantize(w, Statistics(hessian=h), scheme(3, 16, "float16")).tensor
    assert mine.bits_stored < 1.12 * other.bits_stored
    assert error(mine.dequantize()) < error(other.dequantize()) / 2


# --- statistics -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), rows=st.integers(1, 17), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_two_level_values_are_the_nearest_of_their_grid(n: int, rows: int, bits: int, seed: int) -> None:
    values = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    part = TwoLevel.fit(values, bits, rows, torch.float32)
    got = part.values(torch.float64)
    for start in range(0, n, rows):
        group, mine = values[start : start + rows], got[start : start + rows]
        low, high = group.amin(0), group.amax(0)
        levels = low + (high - low) * torch.arange(2**bits, dtype=torch.float64)[:, None] / (2**bits - 1)
        nearest = (group[:, None] - levels[None]).abs().amin(1)
        # The grid's ends are kept in float32.
        torch.testing.assert_close((mine - group).abs(), nearest, rtol=0, atol=1e-6)


def test_small_scales_beside_an_empty_group_do_not_vanish() -> None:
    part = TwoLevel.fit(torch.tensor([[0.0], [1.0], [0.01]]), 3, 16, torch.float16)
    values = part.values(torch.float32)
    assert float(values[0]) == 0
    assert float(values[2]) > 0


def test_statistics_that_float16_cannot_hold_are_kept_in_float32() -> None:
    with pytest.raises(ScaleDtypeError):
        TwoLevel.fit(torch.tensor([[1e-9], [2e-9]]), 3, 16, torch.float16)
    w, h = problem(16, 32)
    for factor in (1e-8, 1e6):
        result = Spqr().quantize(factor * w, Statistics(hessian=h), scheme(3, 16, "float16"))
        assert sparse(result).scale.step.dtype is torch.float32
        assert "stored in float32" in result.notes[-1]
        assert float((result.tensor.dequantize() - factor * w).norm() / (factor * w).norm()) < 0.3


@pytest.mark.parametrize("round_zero", [False, True])
def test_degenerate_weights_work(round_zero: bool) -> None:
    w, h = problem(20, 32)
    params = {"round_zero": round_zero}
    assert not spqr(torch.zeros(20, 32), h, scheme(3, 16), **params).dequantize().any()
    w[3] = 0
    assert not spqr(w, h, scheme(3, 16), **params).dequantize()[3].any()
    constant = torch.full((2, 32), -0.5)
    torch.testing.assert_close(spqr(constant, h, scheme(3, 16), **params).dequantize(), constant)
    for odd in (torch.zeros(32, 32), torch.ones(32, 32)):
        assert torch.isfinite(spqr(w, odd, scheme(3, 16), **params).dequantize()).all()
    for shape in ((1, 32), (5, 1), (1, 1)):
        part = w[: shape[0], : shape[1]]
        q = spqr(part, h[: shape[1], : shape[1]], WeightScheme(4, scale_dtype="float32"), **params).dequantize()
        assert float((q - part).norm()) <= 0.2 * float(part.norm())
    assert torch.isfinite(spqr(w.half(), h, scheme(3, 16, "float16"), **params).dequantize()).all()


def test_notes_say_what_was_done_to_the_hessian() -> None:
    w, h = problem(6, 16)
    dead = h.clone()
    dead[2] = dead[:, 2] = 0
    assert Spqr().quantize(w, Statistics(hessian=dead), scheme(3, 8)).notes == [
        "1 of 16 inputs are always 0 on the calibration text: their weights are set to 0"
    ]
    assert "the Hessian counts as the identity" in Spqr().quantize(w, Statistics(hessian=torch.zeros(16, 16)), scheme(3, 8)).notes[0]
    result = Spqr(damp=0.0).quantize(w, Statistics(hessian=torch.ones(16, 16)), scheme(3, 8))
    assert result.damp is not None
    assert result.damp > 0
    assert "more was used" in result.notes[0]
    assert "symmetric" in Spqr().quantize(w, Statistics(hessian=h), scheme(3, 8, symmetric=True)).notes[0]


# --- stored format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("params", [{}, {"round_zero": True}, {"outlier_threshold": math.inf}, {"zero_bits": 5, "scale_bits": 4}])
@pytest.mark.parametrize("act_order", [False, True])
def test_packing_is_exact_and_as_large_as_the_formula_says(params: dict[str, Any], act_order: bool, dtype: str) -> None:
    n, k, size = 48, 96, 16
    w, h = problem(n, k)
    tensor = spqr(w, h, scheme(3, size, dtype), act_order=act_order, stat_rows=8, **params)
    for t in (tensor, tensor.with_input_scale(torch.linspace(0.5, 2, k))):
        again = unpack(t.format, t.pack(), json.loads(json.dumps(t.meta())))
        assert isinstance(again, SparseTensor)
        assert torch.equal(again.dequantize(), t.dequantize())
        assert all(torch.equal(a, b) for a, b in zip(again.pack().values(), t.pack().values(), strict=True))
    zero_bits = None if params.get("round_zero") else params.get("zero_bits", 3)
    stat_bits = 16 if dtype == "float16" else 32
    formula = bits_formula(3, size, 8, params.get("scale_bits", 3), zero_bits, tensor.outlier_share, stat_bits) + act_order * 8 / n
    # Beyond the formula: a count of outliers per row, and the last byte of every stream.
    assert 0 <= (tensor.bits_stored - formula) * n * k <= 32 * n + 8 * len(tensor.pack())


def test_columns_beyond_16_bits_are_kept() -> None:
    k = 2**16 + 8
    values = torch.tensor([1.5, 2.5])
    at = torch.tensor([0, 0]), torch.tensor([7, k - 1])
    part = TwoLevel(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1), 3, 16)
    for width in (k, 2**16):
        columns = at[1].clamp(max=width - 1)
        tensor = SparseTensor(torch.zeros(1, width, dtype=torch.uint8), 3, part, part, at[0], columns, values)
        again = unpack("sparse", tensor.pack(), tensor.meta())
        assert again.dequantize()[0, columns].tolist() == [1.5, 2.5]


def test_the_formula_gives_the_published_bits() -> None:
    assert bits_formula(3, 16, 16, 3, 3, 0.0) == 3.625
    assert bits_formula(3, 16, 16, 3, 3, 0.01) == pytest.approx(3.945)


def test_it_is_a_method_of_quantize_linear() -> None:
    w, h = problem(16, 32)
    tensor = quantize_linear(w, method="spqr", bits=3, group_size=16, hessian=h)
    assert isinstance(tensor, SparseTensor)
    with pytest.raises(ValueError, match="spqr does not work with weight"):
        Spqr().quantize(w, Statistics(hessian=h), WeightScheme(3, granularity=Granularity.TENSOR))
    with pytest.raises(ValueError, match="outlier_threshold=-1"):
        Spqr(outlier_threshold=-1.0)
