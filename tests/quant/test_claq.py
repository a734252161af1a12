"""CLAQ: golden values, the solver's identity with codebooks, which columns get bits and reserved weights, edge cases."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant import methods, quantize_linear
from quant.factors import inverse_factor
from quant.kernels import kernel
from quant.methods.base import Linear, Rounded
from quant.methods.claq import BATCHED, Claq, Codebooks, centres_of, ranked, side_by_side, tails, widths_of
from quant.scheme import WeightScheme
from quant.solver import solve_blocks
from quant.statistics import Statistics
from quant.tensors.codebook import CodebookTensor

BITS2 = WeightScheme(2, scale_dtype="float32")


@cache
def golden() -> tuple[Tensor, Tensor]:
    """The published inputs: `[512, 64]` and eight sequences `[8, 64, 64]`."""
    w = np.random.RandomState(2).standard_t(5, (512, 64))
    w[:, [3, 17, 40]] *= 4
    x = np.random.RandomState(1).standard_normal((8, 64, 64)) * (0.25 + ((7 * np.arange(64)) % 11) / 11)
    return torch.from_numpy(w.astype(np.float32)), torch.from_numpy(x.astype(np.float32))


def problem(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Weight `[N, K]` and the Hessian of correlated tokens."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * k, k, generator=g, dtype=dtype) @ (torch.eye(k, dtype=dtype) + 0.3 * torch.randn(k, k, generator=g, dtype=dtype))
    return torch.randn(n, k, generator=g, dtype=dtype), 2 * x.T @ x


def rounded(w: Tensor, h: Tensor, scheme: WeightScheme = BITS2, name: str = "weight", **params: Any) -> tuple[CodebookTensor, Rounded]:
    result = Claq(**params).quantize(w, Statistics(hessian=h), scheme, Linear(name))
    assert isinstance(result.tensor, CodebookTensor)
    return result.tensor, result


@pytest.mark.parametrize(("bits", "rel"), [(2, 0.486027), (3, 0.258170)])
def test_errors_equal_the_reference_code(bits: int, rel: float) -> None:
    w, x = golden()
    q = quantize_linear(w, method="claq", bits=bits, inputs=x).dequantize()
    # The same algorithm and random numbers; a choice may flip where sums in float32 and float64 differ, one weight in 32,768 at a time.
    assert float((q.double() - w.double()).norm() / w.double().norm()) == pytest.approx(rel, rel=1e-3)


@pytest.mark.parametrize("start", ["plus_plus", "partition"])
@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize(("block", "together"), [(5, False), (128, False), (5, True)])
def test_summed_errors_are_the_output_error(start: str, reserve: bool, block: int, together: bool) -> None:
    w, h = problem(140, 24)
    upper, _ = inverse_factor(h, 0.0)
    fractions = [0.014 if j % 5 == 0 else 0.004 for j in range(24)] if reserve else None
    columns, widths = w.T.contiguous(), [2, 3, 4] * 8
    centres = centres_of(columns, widths, kernel("kmeans_columns").run, start) if together else None
    fitted = Codebooks(widths, fractions, torch.float32, start, centres)
    [solved] = solve_blocks([columns], upper, block, side_by_side(kernel("claq_block"), [fitted]))
    tensor = fitted.tensor(solved, torch.arange(24), 3.0)
    d = w - tensor.dequantize().double()
    torch.testing.assert_close(solved.loss.sum(), ((d @ h) * d).sum(), rtol=1e-10, atol=0)


def test_every_column_has_the_kmeans_table_of_the_weights_with_earlier_errors_fed_back() -> None:
    """Independent: column by column, the rest is the least-squares optimum given what is fixed."""
    w, h = problem(60, 6)
    tensor, _ = rounded(w, h, damp=0.0)
    q = tensor.dequantize().double()
    order = h.diagonal().argsort(descending=True).tolist()
    plain = kernel("kmeans_columns", "reference").run
    for step, j in enumerate(order):
        fixed, rest = order[:step], order[step:]
        column = w[:, j]
        if fixed:
            change = (q - w)[:, fixed] @ h[fixed][:, rest]
            column = column - torch.linalg.solve(h[rest][:, rest], change.T).T[:, 0]
        centres = plain.kmeans(column[None], 4)[0]
        torch.testing.assert_close(tensor.tables[j].double(), centres, rtol=1e-5, atol=1e-6)
        assert torch.equal(tensor.codes[:, j], plain.nearest(column[None], centres[None])[0])


@pytest.mark.parametrize("start", ["plus_plus", "partition"])
def test_codebooks_of_the_weight_as_given_are_those_of_the_loop_where_nothing_is_fed_back(start: str) -> None:
    w, h = problem(150, 20)
    params = {"adaptive_bits": 2.3, "outlier_reservation": True, "kmeans_start": start}
    for diagonal in (True, False):
        own = torch.diag(h.diagonal()) if diagonal else h
        (loop, plain), (batched, result) = (rounded(w, own, codebooks=c, **params) for c in ("in_loop", "batched"))
        same = [torch.equal(a, b) for a, b in zip(loop.pack().values(), batched.pack().values(), strict=True)]
        assert all(same) == diagonal
        assert result.notes == [*plain.notes, BATCHED]
    # Each table is the fit of a column alone, whatever is fed back.
    for j, width in enumerate(batched.widths.tolist()):
        assert torch.equal(
            batched.tables[j, : 2**width].double(), kernel("kmeans_columns").run.kmeans(w.T[j][None], 2**width, start)[0].float()
        )


def test_better_starts_and_more_bits_have_less_error() -> None:
    w, x = golden()

    def error(**params: Any) -> float:
        return float((x @ (quantize_linear(w, method="claq", inputs=x, **params).dequantize() - w).T).square().sum())

    plain = error(bits=2)
    assert error(bits=2, kmeans_start="partition") < plain
    assert plain < error(bits=2, codebooks="batched")
    assert error(bits=4) < error(bits=2, adaptive_bits=2.5) < error(bits=2, adaptive_bits=2.1) < plain
    assert error(bits=4) < error(bits=3, adaptive_bits=3.2) < error(bits=3) < plain
    assert error(bits=2, outlier_reservation=True) < plain
    assert error(bits=2, outlier_reservation=True, adaptive_bits=2.1) < error(bits=2, adaptive_bits=2.1)
    assert plain < float((x @ (quantize_linear(w, method="rtn", bits=2).dequantize() - w).T).square().sum())


@pytest.mark.parametrize(
    ("target", "expected"),
    [(2, {2: 40}), (2.1, {2: 38, 4: 2}), (2.5, {2: 30, 4: 10}), (3, {3: 40}), (3.2, {3: 32, 4: 8}), (4, {4: 40}), (8, {8: 40})],
)
def test_adaptive_precision_gives_four_bits_to_as_many_columns_as_the_target_says(target: float, expected: dict[int, int]) -> None:
    widths = widths_of(float(target), torch.arange(39, -1, -1))
    assert {b: widths.count(b) for b in set(widths)} == expected
    assert widths == sorted(widths)  # the last columns have the highest rank here


def planted(n: int = 256, k: int = 40, columns: tuple[int, ...] = (4, 11, 23, 38)) -> tuple[Tensor, Tensor]:
    """A tenth of the columns with a few large weights."""
    w, h = problem(n, k, dtype=torch.float32)
    for j in columns:
        w[:: n // 8, j] *= 50
    return w, h


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("score", ["magnitude", "hessian"])
def test_planted_columns_get_the_larger_share_of_reserved_weights_and_the_bits(score: str, act_order: bool) -> None:
    w, h = planted()
    h = torch.diag(h.diagonal())  # no feedback: every column is the given one
    params = {"outlier_reservation": True, "score": score, "act_order": act_order, "kmeans_start": "partition"}
    tensor, result = rounded(w, h, adaptive_bits=2.2, **params)
    assert (tensor.widths == 4).nonzero()[:, 0].tolist() == [4, 11, 23, 38]
    assert tensor.outliers is not None
    few, many = sum(tails(256, 0.004)), sum(tails(256, 0.014))
    assert (few, many) == (3, 9)
    counts = tensor.outliers.counts
    assert counts.tolist() == [many if j in (4, 11, 23, 38) else few for j in range(40)]
    rows = torch.split(tensor.outliers.rows, counts.tolist())
    for j in range(40):
        rank = w[:, j].argsort(descending=True).argsort()
        kept = rank[rows[j]].tolist()
        top, bottom = tails(256, 0.014 if j in (4, 11, 23, 38) else 0.004)
        assert sorted(kept) == [*range(top), *range(256 - bottom, 256)]
        assert torch.equal(tensor.dequantize()[rows[j], j], w[rows[j], j])
    assert result.details["columns_by_bits"] == {"2": 36, "4": 4}
    assert result.details["outlier_share"] == len(tensor.outliers.values) / w.numel()


def test_tails_are_inclusive_ranks() -> None:
    assert tails(1024, 0.004) == (5, 4)
    assert tails(4096, 0.014) == (58, 57)
    assert tails(124, 0.004) == (1, 0)
    assert tails(1, 0.014) == (1, 0)


def test_reference_looks_fractions_up_by_the_index_inside_a_block() -> None:
    w, _ = planted(512)
    h = torch.diag(torch.linspace(5, 1, 40))  # the order of work is the plain one
    few = sum(tails(512, 0.004))

    def rich(**params: Any) -> list[int]:
        tensor, _ = rounded(w, h, outlier_reservation=True, kmeans_start="partition", **params)
        assert tensor.outliers is not None
        return (tensor.outliers.counts > few).nonzero()[:, 0].tolist()

    assert rich(variant="corrected", block_size=16) == [4, 11, 23, 38]
    assert rich(variant="reference", block_size=16) == [4, 11, 20, 27, 36]  # 4 and 11, then 16 later, and 32 later
    assert rich(variant="reference") == [4, 11, 23, 38]


def test_reserved_weights_count_in_the_fit_and_are_exact() -> None:
    w, h = problem(300, 8)
    h = torch.diag(h.diagonal())
    plain, _ = rounded(w, h)
    reserved, _ = rounded(w, h, outlier_reservation=True)
    assert torch.equal(plain.tables, reserved.tables)
    assert torch.equal(plain.codes, reserved.codes)
    assert reserved.outliers is not None
    assert (plain.bits_nominal, reserved.bits_nominal) == (2, pytest.approx(2.07))


def test_ranks_are_stable_and_follow_both_scores() -> None:
    columns = torch.zeros(5, 30)
    columns[:, 0] = 0.1
    columns[3, :2] = 100.0
    columns[1, 7] = 100.0
    assert ranked(columns, torch.eye(5), "magnitude").tolist() == [3, 1, 0, 2, 4]
    upper = torch.diag(torch.tensor([1e-5, 1.0, 1.0, 1.0, 1.0]))
    assert ranked(columns, upper, "hessian").tolist() == [0, 3, 1, 2, 4]


def test_layers_have_bits_of_their_own() -> None:
    w, h = problem(64, 10)
    given = {"layers.0.*": 3, "layers.1.up": 2.4, "*.down": 4}
    made = methods.rounding("claq", {"layer_bits": given})
    assert methods.rounding("claq", {"layer_bits": tuple(given.items())}) == made

    def widths(name: str) -> set[int]:
        tensor = made.quantize(w, Statistics(hessian=h), BITS2, Linear(name)).tensor
        assert isinstance(tensor, CodebookTensor)
        return set(tensor.widths.tolist())

    assert [widths(n) for n in ("layers.0.q", "layers.1.up", "layers.1.down", "layers.1.q")] == [{3}, {2, 4}, {4}, {2}]
    with pytest.raises(ValueError, match=r"layer_bits gives layers\.0\.down different bits"):
        widths("layers.0.down")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 3, "adaptive_bits": 2.2}, r"adaptive_bits=2\.2 mixes columns of 2 and 4 bits: set weight\.bits=2, not 3"),
        ({"bits": 2, "adaptive_bits": 2.0}, r"adaptive_bits=2\.0 is not .* a number above 2 up to 4"),
        ({"bits": 2, "score": "loss"}, "score='loss' is not .* one of magnitude, hessian"),
        ({"bits": 2, "variant": "paper"}, "variant='paper' is not .* one of reference, corrected"),
        ({"bits": 2, "kmeans_start": "x"}, "kmeans_start='x' is not .* one of plus_plus, partition"),
        ({"bits": 2, "layer_bits": {"a": 5}}, r"layer_bits=.*'a', 5.* is not .* a number from 2 to 4"),
        ({"bits": 2, "layer_bits": "a"}, "layer_bits='a' is not a value for claq; give a mapping"),
        ({"bits": 2, "group_size": 8}, "claq does not work with weight.granularity=group; it works with channel"),
        ({"bits": 2, "block_size": 0}, "block_size=0 is not .* from 1"),
        ({"bits": 2, "damp": -1.0}, r"damp=-1\.0 is not .* from 0"),
    ],
)
def test_wrong_settings_say_what_is_allowed(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_linear(torch.randn(4, 16), method="claq", hessian=torch.eye(16), **params)


# --- edge cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_columns_with_few_rows_are_kept_exactly(rows: int, reserve: bool) -> None:
    w, h = problem(rows, 7, dtype=torch.float32)
    tensor, result = rounded(w, h, outlier_reservation=reserve)
    assert torch.equal(tensor.dequantize(), w)
    assert len(result.notes) == reserve
    assert tensor.outliers is None or tensor.outliers.values.numel() == 0


def test_few_rows_reserve_the_largest_weight_only_and_say_so() -> None:
    w, h = problem(100, 12)
    tensor, result = rounded(w, torch.diag(h.diagonal()), outlier_reservation=True)
    assert result.notes == ["outlier reservation: 100 rows are too few for the fraction 0.004, whose lower tail is empty"]
    assert tensor.outliers is not None
    assert sorted(tensor.outliers.counts.tolist()) == [1] * 11 + [3]  # 0.014 of 100 rows: two at the top, one at the bottom


def test_equal_weights_dead_inputs_and_zero_rows_are_exact() -> None:
    w, h = problem(40, 9, dtype=torch.float32)
    w[:, 2], w[3] = 0.7, 0
    h = torch.diag(h.diagonal())
    h[5, 5] = 0
    tensor, result = rounded(w, h, outlier_reservation=True)
    q = tensor.dequantize()
    assert torch.equal(q[:, 2], w[:, 2])
    assert bool((q[:, 5] == 0).all())
    assert "1 of 9 inputs are always 0 on the calibration text: their weights are set to 0" in result.notes
    assert tensor.outliers is not None
    assert tensor.outliers.counts[[2, 5]].tolist() == [0, 0]
    zeros, _ = rounded(torch.zeros(6, 9), torch.zeros(9, 9), outlier_reservation=True, adaptive_bits=2.5)
    assert not zeros.dequantize().any()


def test_tables_are_stored_in_float16_where_that_holds_them() -> None:
    w, h = problem(64, 10, dtype=torch.float32)
    half = WeightScheme(3)
    tensor, result = rounded(w, h, half)
    assert (tensor.tables.dtype, result.notes) == (torch.float16, [])
    for factor in (1e-8, 1e6):
        for reserve in (False, True):
            tensor, result = rounded(factor * w, h, half, outlier_reservation=reserve, kmeans_start="partition")
            assert tensor.tables.dtype is torch.float32
            assert result.notes[-1] == "a codebook does not fit float16; scales are stored in float32"
    w[0, 0] = 1e5
    _, result = rounded(w, torch.diag(h.diagonal()), half, outlier_reservation=True)
    assert result.notes[-1].endswith("does not fit float16; scales are stored in float32")


def test_a_symmetric_scheme_has_no_effect_and_says_so() -> None:
    w, h = problem(30, 5)
    plain, _ = rounded(w, h)
    tensor, result = rounded(w, h, WeightScheme(2, symmetric=True, scale_dtype="float32"))
    assert torch.equal(plain.dequantize(), tensor.dequantize())
    assert result.notes == ["codebooks have no symmetric form: weight.symmetric has no effect"]


def test_a_singular_hessian_climbs_the_ladder() -> None:
    w, _ = problem(30, 12, dtype=torch.float32)
    h = torch.diag(torch.arange(1.0, 13.0))
    h[0, 1] = h[1, 0] = 1.9
    _, result = rounded(w, h, damp=0.001)
    assert result.damp == pytest.approx(0.1)
    assert "0.1 was used" in result.notes[0]
