"""What must be true of the column solver and of GPTQ, whatever the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.errors import NonFiniteError, require_all_finite, require_finite
from quant.factors import inverse_factor
from quant.methods.gptq import Gptq
from quant.methods.rtn import Rtn
from quant.scheme import Granularity, WeightScheme
from quant.solver import Solved, solve_columns
from quant.statistics import Statistics, collect
from quant.tensors.affine import AffineTensor

CHANNEL3 = WeightScheme(3, scale_dtype="float32")


def group_scheme(bits: int, size: int, symmetric: bool = False) -> WeightScheme:
    return WeightScheme(bits, symmetric, Granularity.GROUP, size, "float32")


def problem(n: int, k: int, seed: int, tokens: int = 200, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Weight `[N, K]`, correlated tokens `[T, K]` and their Hessian."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g, dtype=dtype)
    x = torch.randn(tokens, k, generator=g, dtype=dtype) @ (torch.eye(k, dtype=dtype) + 0.3 * torch.randn(k, k, generator=g, dtype=dtype))
    return w, x, 2 * x.T @ x


def solve(w: Tensor, h: Tensor, scale: float, block_size: int) -> Solved:
    """On a fixed grid of step `scale`, 3 bits."""
    one = torch.ones(w.shape[0], dtype=w.dtype)
    affine = Affine(scale * one, 4 * one, 3, ZeroKind.CONSTANT)

    def round_column(j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        codes = affine.encode(column)
        return codes, affine.decode(codes)

    return solve_columns(w.T.contiguous(), inverse_factor(h, 0.0)[0], block_size, round_column)


def stored(method: Gptq | Rtn, w: Tensor, h: Tensor | None, scheme: WeightScheme) -> AffineTensor:
    tensor = method.quantize(w, Statistics(hessian=h), scheme).tensor
    assert isinstance(tensor, AffineTensor)
    return tensor


def proxy(w: Tensor, q: Tensor, h: Tensor) -> float:
    d = (w - q).double()
    return float(((d @ h.double()) * d).sum())


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), k=st.integers(1, 40), block=st.integers(1, 45), seed=st.integers(0, 999))
def test_summed_errors_are_the_output_error(n: int, k: int, block: int, seed: int) -> None:
    w, _, h = problem(n, k, seed)
    solved = solve(w, h, 0.5, block)
    d = w - solved.values.T
    torch.testing.assert_close(solved.loss, torch.einsum("nk,kl,nl->n", d, h, d), rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(k=st.integers(2, 30), block=st.integers(1, 32), seed=st.integers(0, 999))
def test_block_size_does_not_matter_on_a_fixed_grid(k: int, block: int, seed: int) -> None:
    w, _, h = problem(4, k, seed)
    assert torch.equal(solve(w, h, 0.4, block).codes, solve(w, h, 0.4, k).codes)


@pytest.mark.parametrize(("dtype", "expected", "most"), [(torch.float64, 1e-9, 0), (torch.float32, 0.1, 3)])
def test_one_cholesky_gives_the_codes_of_three_steps(dtype: torch.dtype, expected: float, most: int) -> None:
    """Reference: H⁻¹ from a factor of H, then its own factor, as the published code computes U.

    The two round otherwise, and so do BLAS libraries and numbers of threads. A weight whose code is another by that takes the rest of its
    row along: rows are counted, not codes. As many part as weights have the middle between two codes between them as updated by one factor
    and by the other: of a step, the difference's share each, all together `expected` rows at most. Above `most` lie 4e-6 of Poisson's
    distribution with that mean (float64: 1e-9)."""
    w, _, h = problem(160, 128, 3, dtype=dtype)
    u, _ = inverse_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(128, dtype=dtype)
    three_steps = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    step, one = 0.4, torch.ones(w.shape[0], dtype=dtype)
    affine = Affine(step * one, 4 * one, 3, ZeroKind.CONSTANT)

    def codes(upper: Tensor) -> tuple[Tensor, Tensor]:
        """And the weights as updated; both `[K, N]`."""
        updated: list[Tensor] = []

        def round_column(j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            updated.append(column.clone())
            return affine.encode(column), affine.round(column)

        return solve_columns(w.T, upper, 128, round_column).codes, torch.stack(updated)

    (ours, mine), (theirs, other) = codes(u), codes(three_steps)
    differ = ours != theirs
    together = differ.cumsum(0) - differ.int() == 0  # until a row's first other code, and that
    assert float((mine - other).abs()[together].sum()) / step <= expected
    assert int(differ.any(0).sum()) <= most


def test_after_every_column_the_others_are_the_least_squares_optimum() -> None:
    w, _, h = problem(3, 6, 5)
    one = torch.ones(3, dtype=w.dtype)
    affine = Affine(0.5 * one, 4 * one, 3, ZeroKind.CONSTANT)
    rounded: list[Tensor] = []

    def round_column(j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if j:
            # Independent: with the first j columns fixed, the rest solves H_rr d_r = -H_rf d_f.
            fixed = torch.stack(rounded, dim=1) - w[:, :j]
            rest = w[:, j:] - torch.linalg.solve(h[j:, j:], h[j:, :j] @ fixed.T).T
            torch.testing.assert_close(column, rest[:, 0], rtol=1e-9, atol=1e-9)
        codes = affine.encode(column)
        rounded.append(affine.decode(codes))
        return codes, rounded[-1]

    solve_columns(w.T.contiguous(), inverse_factor(h, 0.0)[0], 2, round_column)
    assert len(rounded) == 6


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_diagonal_hessian_gives_the_codes_of_rtn(act_order: bool, symmetric: bool) -> None:
    w, _, _ = problem(5, 24, 1, dtype=torch.float32)
    h = torch.diag(torch.rand(24, generator=torch.Generator().manual_seed(2)) + 0.1)
    for scheme, method in (
        (WeightScheme(3, symmetric, scale_dtype="float32"), Gptq(act_order=act_order)),
        (group_scheme(3, 6, symmetric), Gptq(act_order=act_order, static_groups=True)),
    ):
        assert torch.equal(stored(method, w, h, scheme).codes, stored(Rtn(), w, None, scheme).codes)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("size", [None, 8])
def test_output_error_is_below_rtn(act_order: bool, static_groups: bool, size: int | None) -> None:
    better = 0
    for seed in range(20):
        w, _, h = problem(8, 32, seed, dtype=torch.float32)
        scheme = CHANNEL3 if size is None else group_scheme(3, size)
        gptq = stored(Gptq(act_order=act_order, static_groups=static_groups), w, h, scheme)
        better += proxy(w, gptq.dequantize(), h) < proxy(w, stored(Rtn(), w, None, scheme).dequantize(), h)
    assert better >= 19


def test_the_solver_lies_between_exhaustive_search_and_rounding_to_nearest() -> None:
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5], dtype=torch.float64)
    candidates = torch.cartesian_prod(*[values] * 5)
    one = torch.ones(1, dtype=torch.float64)
    affine = Affine(0.5 * one, 2 * one, 2, ZeroKind.CONSTANT)
    best, found, nearest = 0.0, 0.0, 0.0
    for seed in range(10):
        w, _, h = problem(1, 5, seed)
        least = float(torch.einsum("nk,kl,nl->n", candidates - w, h, candidates - w).min())
        solved = solve_columns(w.T.contiguous(), inverse_factor(h, 0.0)[0], 2, lambda j, c, _: (affine.encode(c), affine.round(c)))
        assert least <= float(solved.loss) * (1 + 1e-12)
        best, found, nearest = best + least, found + float(solved.loss), nearest + proxy(w, affine.round(w), h)
    assert best <= found < nearest


def test_act_order_equals_solving_permuted_columns_by_hand() -> None:
    w, _, h = problem(4, 16, 3, dtype=torch.float32)
    order = torch.argsort(h.diagonal(), descending=True)
    ordered = stored(Gptq(act_order=True), w, h, CHANNEL3)
    by_hand = stored(Gptq(), w[:, order], h[order][:, order], CHANNEL3)
    assert torch.equal(ordered.codes[:, order], by_hand.codes)
    assert ordered.g_idx is None

    grouped = stored(Gptq(act_order=True), w, h, group_scheme(3, 4))
    by_hand = stored(Gptq(), w[:, order], h[order][:, order], group_scheme(3, 4))
    assert torch.equal(grouped.dequantize()[:, order], by_hand.dequantize())


def test_dynamic_groups_inside_a_block_are_fitted_on_weights_from_before_the_block() -> None:
    w, _, h = problem(3, 8, 11, dtype=torch.float32)
    dynamic = stored(Gptq(block_size=8), w, h, group_scheme(3, 4))
    fitted_at_start = stored(Gptq(static_groups=True), w, h, group_scheme(3, 4))
    assert torch.equal(dynamic.codes, fitted_at_start.codes)
    fresh = stored(Gptq(block_size=4), w, h, group_scheme(3, 4))
    assert torch.equal(fresh.scale[:, 0], fitted_at_start.scale[:, 0])
    assert not torch.equal(fresh.scale[:, 1], fitted_at_start.scale[:, 1])


def test_dead_inputs_are_zeroed_and_noted_after_the_row_range_is_taken() -> None:
    w, x, _ = problem(4, 12, 2, dtype=torch.float32)
    w[:, 5] = 9
    x[:, 5] = 0
    h = 2 * x.T @ x
    result = Gptq().quantize(w, Statistics(hessian=h), CHANNEL3)
    assert result.notes == ["1 of 12 inputs are always 0 on the calibration text: their weights are set to 0"]
    assert torch.all(result.tensor.dequantize()[:, 5] == 0)
    assert isinstance(result.tensor, AffineTensor)
    assert torch.equal(result.tensor.scale, stored(Rtn(), w, None, CHANNEL3).scale)
    # Ranges of groups are taken later: from the zeroed weight.
    for static in (False, True):
        groups = stored(Gptq(static_groups=static), w, h, group_scheme(3, 6))
        alone = stored(Rtn(), w.index_fill(1, torch.tensor(5), 0), None, group_scheme(3, 6))
        assert torch.equal(groups.scale[:, 0], alone.scale[:, 0])


def test_an_input_of_zeros_rounds_to_nearest_and_says_so() -> None:
    w, _, _ = problem(4, 12, 2, dtype=torch.float32)
    result = Gptq().quantize(w, Statistics(hessian=torch.zeros(12, 12)), CHANNEL3)
    assert torch.equal(result.tensor.dequantize(), stored(Rtn(), w, None, CHANNEL3).dequantize())
    assert "all inputs are always 0 on the calibration text" in result.notes[0]


def test_a_singular_hessian_climbs_the_ladder_and_reports_the_damping() -> None:
    w, _, _ = problem(4, 12, 2, dtype=torch.float32)
    h = torch.diag(torch.arange(1.0, 13.0))
    h[0, 1] = h[1, 0] = 1.9  # indefinite: 1 · 2 < 1.9²; the mean of the diagonal is 6.5
    result = Gptq(damp=0.001).quantize(w, Statistics(hessian=h), CHANNEL3)
    assert result.damp == pytest.approx(0.1)
    assert "0.1 was used" in result.notes[0]
    assert torch.isfinite(result.tensor.dequantize()).all()


def test_rank_deficient_statistics_work_with_the_default_damping() -> None:
    w, x, _ = problem(4, 40, 2, tokens=5, dtype=torch.float32)
    result = Gptq().quantize(w, collect(x, frozenset({"hessian"})), CHANNEL3)
    assert (result.damp, result.notes) == (0.01, [])


def test_values_that_are_not_finite_are_located() -> None:
    w = torch.ones(3, 4)
    w[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weight of shape \(3, 4\) has 1 NaN or infinite values, the first at \(1, 2\)"):
        Gptq().quantize(w, Statistics(hessian=torch.eye(4)), CHANNEL3)
    with pytest.raises(NonFiniteError, match="Hessian"):
        Gptq().quantize(torch.ones(3, 4), Statistics(hessian=torch.full((4, 4), float("inf"))), CHANNEL3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_values_whose_sum_is_not_are_taken(dtype: torch.dtype) -> None:
    require_finite("weight", torch.full((3, 4), 3e38, dtype=dtype))
    require_all_finite([("weight", torch.full((3, 4), 3e38, dtype=dtype)), ("Hessian", torch.eye(4))])


def test_hessian_is_scaled_by_sequences_and_does_not_depend_on_batching() -> None:
    x = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(0))
    h = collect(x, frozenset({"hessian"})).hessian
    assert h is not None
    torch.testing.assert_close(h, (2 / 6) * torch.einsum("stk,stl->kl", x, x), rtol=1e-5, atol=1e-6)
    one = collect(x.reshape(-1, 5), frozenset({"hessian"})).hessian
    assert one is not None
    torch.testing.assert_close(one, 6 * h, rtol=1e-5, atol=1e-6)
