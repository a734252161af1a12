"""BiLLM: its searches against loops, every block replayed from what is stored, and the order of its variants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import quantize_linear
from quant.binary import binarize, stored
from quant.errors import NonFiniteError, ScaleDtypeError
from quant.factors import inverse_factor
from quant.kernels.braq_block.eager import first_least, ranked, reference_quantiles
from quant.kernels.braq_search import batched
from quant.methods import billm_search as search
from quant.methods.base import Rounded
from quant.methods.billm import Billm, entropy
from quant.parameters import ROUNDINGS
from quant.scheme import WeightScheme
from quant.statistics import Statistics
from quant.tensors.binary import BinaryTensor
from tests.quant.slow_binary import error, joint_masks, layer, output_error, paper_masks, reference_masks, slow_binarize

W1 = WeightScheme(1, scale_dtype="float32")
W1_HALF = WeightScheme(1)
SHAPES = {"n": st.integers(1, 5), "c": st.integers(1, 14), "seed": st.integers(0, 999), "tied": st.booleans()}


def block(n: int, c: int, seed: int, tied: bool) -> Tensor:
    """Heavy-tailed values; tied ones repeat and hold zeros."""
    x = torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return x.round() if tied else x


def first(c: int, k: int, n: int) -> Tensor:
    return (torch.arange(c) < k).expand(n, c)


def billm(w: Tensor, statistics: Statistics, scheme: WeightScheme = W1, **params: Any) -> tuple[BinaryTensor, Rounded]:
    rounded = Billm(**params).quantize(w, statistics, scheme)
    assert isinstance(rounded.tensor, BinaryTensor)
    return rounded.tensor, rounded


# --- searches -------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(**SHAPES, order=st.integers(1, 3), means=st.booleans())
def test_the_binarizer_equals_a_loop_over_rows(n: int, c: int, seed: int, tied: bool, order: int, means: bool) -> None:
    x = block(n, c, seed, tied)
    mask = block(n, c, seed + 1, False) > 0
    got = binarize(x, mask, order, means=means).value
    torch.testing.assert_close(got, slow_binarize(x, mask, order, means), rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(**{**SHAPES, "tied": st.just(False)})
def test_errors_of_all_salient_counts_equal_a_loop(n: int, c: int, seed: int, tied: bool) -> None:
    # Not with ties: a value that equals its mean but for rounding has either sign, and the second order depends on it.
    x, counts = block(n, c, seed, tied), range(1, c + 1)
    want = [error(x, (first(c, k, n), 2), (~first(c, k, n), 2), means=True) for k in counts]
    got = batched.order_two_errors(x, counts)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9 * float(x.square().sum()))


@settings(max_examples=15, deadline=None)
@given(**SHAPES)
def test_errors_of_all_thresholds_equal_a_loop(n: int, c: int, seed: int, tied: bool) -> None:
    x = block(n, c, seed, tied)
    thresholds = torch.cat([torch.tensor([0.0, 1.0, 1e9], dtype=x.dtype), reference_quantiles(x.abs())[::9]])
    want = [error(x, (x.abs() >= t, 1), (x.abs() < t, 1), means=True) for t in thresholds]
    got = batched.split_errors(x, thresholds)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9 * float(x.square().sum()))


@settings(max_examples=10, deadline=None)
@given(**SHAPES)
def test_errors_of_all_counts_with_all_thresholds_equal_a_loop(n: int, c: int, seed: int, tied: bool) -> None:
    x, counts = block(n, c, seed, tied), range(min(c, 5) + 1)
    thresholds = reference_quantiles(x.abs())[::16]
    want = torch.zeros(len(counts), thresholds.numel(), dtype=torch.float64)
    for k in counts:
        for i, t in enumerate(thresholds):
            salient = first(c, k, n)
            high = ~salient & (x.abs() >= t)
            want[k, i] = error(x, (salient, 2), (high, 1), (~salient & ~high, 1), means=False)
    got = search.joint_errors(x.abs(), counts, thresholds)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(x.square().sum()))


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = block(7, 9, 3, False)
    t = reference_quantiles(x.abs())

    def all_errors() -> list[Tensor]:
        return [batched.order_two_errors(x, range(1, 9)), batched.split_errors(x, t), search.joint_errors(x.abs(), range(9), t)]

    whole = all_errors()
    monkeypatch.setattr(batched, "CHUNK", 1)
    for a, b in zip(all_errors(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_first_of_equal_candidates_wins() -> None:
    assert first_least(torch.tensor([3.0, 1.0, 2.0, 1.0])) == 1
    assert ranked(torch.tensor([1.0, 2.0, 2.0, 0.0])).tolist() == [1, 2, 0, 3]


# --- blocks ---------------------------------------------------------------------------------------------------------


def replayed(w: Tensor, q: Tensor, upper: Tensor, block_size: int, in_block: bool) -> tuple[Tensor, Tensor, Tensor]:
    """From the result alone: weights at the start of their block, weights when they were rounded, errors e. All `[N, K]`."""
    w = w.double().clone()
    starts, at, e = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
    for start in range(0, w.shape[1], block_size):
        end = min(start + block_size, w.shape[1])
        starts[:, start:end] = w[:, start:end]
        for j in range(start, end):
            at[:, j] = w[:, j]
            e[:, j] = (w[:, j] - q[:, j]) / upper[j, j]
            w[:, j + 1 : end] -= in_block * torch.outer(e[:, j], upper[j, j + 1 : end])
        w[:, end:] -= e[:, start:end] @ upper[start:end, end:]
    return starts, at, e


@pytest.mark.parametrize("variant", ROUNDINGS["billm"]["variant"].words)
@pytest.mark.parametrize(("metric", "scale_dtype"), [("hessian", "float16"), ("magnitude", "float32")])
def test_every_block_is_chosen_and_binarized_by_the_rules(variant: str, metric: str, scale_dtype: str) -> None:
    n, k, size = (2, 13, 7) if variant == "joint" else (4, 40, 15)
    w, statistics = layer(n, k, 5)
    assert statistics.hessian is not None
    tensor, _ = billm(w, statistics, WeightScheme(1, scale_dtype=scale_dtype), variant=variant, metric=metric, block_size=size)
    upper, _ = inverse_factor(statistics.hessian.double(), 0.01)
    q = tensor.dequantize().double()
    starts, at, e = replayed(w, q, upper, size, variant != "reference")
    inverse = upper.square().sum(0).square() if variant == "paper" else upper.diagonal().square()
    for b, start in enumerate(range(0, k, size)):
        columns = slice(start, min(start + size, k))
        x, now = starts[:, columns], at[:, columns]
        m = x if metric == "magnitude" else x.square() / inverse[columns]
        if variant == "reference":
            salient, high = reference_masks(m)
        else:
            salient, high = (paper_masks if variant == "paper" else joint_masks)(x, m.abs())
        assert torch.equal(tensor.salient[columns], salient[0])
        assert torch.equal(tensor.split[:, columns], high)
        means = variant == "reference"
        parts = [slow_binarize(x, mask, order, means) for mask, order in ((high, 1), (~salient & ~high, 1), (salient, 2))]
        # Every value is off by at most its two scales and its mean, each by 2^-10 of the row's largest.
        bound = 3 * 2.0**-10 * (6 if scale_dtype == "float16" else 1e-3)
        if means:
            torch.testing.assert_close(q[:, columns], sum(parts), rtol=0, atol=bound)
        else:
            # Scales are those of the start; signs follow the compensated weights.
            torch.testing.assert_close(q[:, columns].abs()[~salient], sum(parts).abs()[~salient], rtol=0, atol=bound)
            sure = now.abs() > 1e-3
            assert torch.equal(tensor.signs[:, columns][sure], (now > 0)[sure])
            left = now - torch.where(now >= 0, 1, -1) * tensor.scale[:, b, 2:3].double()
            sure = salient & (left.abs() > 1e-3)
            assert torch.equal(tensor.second[:, columns][sure], (left > 0)[sure])
    if variant != "reference":
        h = statistics.hessian.double()
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
        d = w - q
        torch.testing.assert_close(e.square().sum(1), torch.einsum("nk,kl,nl->n", d, damped, d), rtol=1e-10, atol=0)


def test_the_output_error_of_the_reference_is_that_of_errors_spread_between_blocks() -> None:
    """W - Q = E Ũ, Ũ being U with only the diagonal inside blocks, so that tr((W-Q) H (W-Q)ᵀ) = tr(E Ũ H Ũᵀ Eᵀ)."""
    w, statistics = layer(3, 20, 8)
    assert statistics.hessian is not None
    h = statistics.hessian.double()
    upper, _ = inverse_factor(h, 0.01)
    q = billm(w, statistics, block_size=8)[0].dequantize().double()
    _, _, e = replayed(w, q, upper, 8, False)
    same = torch.arange(20)[:, None] // 8 == torch.arange(20) // 8
    spread = torch.where(same, torch.diag(upper.diagonal()), upper)
    torch.testing.assert_close(w - q, e @ spread, rtol=1e-10, atol=1e-10)
    d = (w - q) @ h @ (w - q).T
    torch.testing.assert_close(d, e @ spread @ h @ spread.T @ e.T, rtol=1e-10, atol=1e-10 * float(d.trace()))


@pytest.mark.parametrize("seed", [0, 1])
def test_errors_of_the_variants_are_in_the_measured_order(seed: int) -> None:
    w, statistics = layer(64, 384, seed, torch.float32)

    def result(**params: Any) -> tuple[float, dict[str, Any]]:
        tensor, rounded = billm(w, statistics, W1_HALF, **params)
        return output_error(w, tensor.dequantize(), statistics), rounded.details

    hessian, facts = result()
    magnitude, _ = result(metric="magnitude")
    matched, _ = result(variant="joint", salient_columns=5)
    assert matched < magnitude < hessian
    assert result(variant="joint")[0] < magnitude
    # The reference's search on saliencies: few columns, and the split pinned at the last quantile.
    assert facts["salient_share"] < 0.08
    assert facts["split_share"] == pytest.approx(0.1, abs=0.01)


# --- what is stored and told ----------------------------------------------------------------------------------------


def test_details_say_what_the_paper_counts_and_what_masks_hold() -> None:
    w, statistics = layer(16, 96, 2, torch.float32)
    tensor, rounded = billm(w, statistics, block_size=32)
    salient, split = tensor.salient.tolist(), tensor.split.tolist()
    r = sum(salient) / 96
    high = sum(map(sum, split)) / (16 * (96 - sum(salient)))
    assert rounded.details == pytest.approx(
        {
            "n_param": 1 + r,
            "n_storing": 1 + 1 / 32,
            "salient_share": r,
            "split_share": high,
            "entropy_split": -high * math.log2(high) - (1 - high) * math.log2(1 - high),
            "entropy_columns": -r * math.log2(r) - (1 - r) * math.log2(1 - r),
        }
    )
    assert tensor.bits_nominal == 1 + r
    assert (entropy(0.0), entropy(0.5), entropy(1.0)) == (0, 1, 0)


@pytest.mark.parametrize("variant", ROUNDINGS["billm"]["variant"].words)
def test_a_fixed_count_of_salient_columns_is_kept(variant: str) -> None:
    w, statistics = layer(4, 40, 2, torch.float32)
    for count, want in ((0, 0), (3, 3 * 2), (99, 40)):
        tensor, _ = billm(w, statistics, variant=variant, block_size=20, salient_columns=count)
        assert int(tensor.salient.sum()) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ROUNDINGS["billm"]["variant"].words)
def test_awkward_weights_and_hessians_work(variant: str, dtype: torch.dtype) -> None:
    w, statistics = layer(5, 30, 4, torch.float32)
    w = w.to(dtype)
    w[0], w[1], w[:, 4:9] = 0, 0.5, 1
    before = w.clone()
    singular = torch.outer(torch.ones(30), torch.ones(30))
    assert statistics.hessian is not None
    dead = statistics.hessian.clone()
    dead[3], dead[:, 3] = 0, 0
    for h in (statistics.hessian, singular, dead, torch.zeros(30, 30)):
        for part in (w, w[:1], w[:, :30]):
            tensor, rounded = billm(part, Statistics(hessian=h), W1_HALF, variant=variant, block_size=16)
            assert torch.isfinite(tensor.dequantize()).all()
            assert all(math.isfinite(v) for v in rounded.details.values())
    assert torch.equal(w, before)
    _, rounded = billm(w, Statistics(hessian=dead), variant=variant)
    assert rounded.notes == ["1 of 30 inputs are always 0 on the calibration text: their weights are set to 0"]
    tensor, _ = billm(w[:, :1], Statistics(hessian=torch.ones(1, 1)), variant=variant)
    assert tensor.shape == (5, 1)


def test_a_row_of_equal_weights_is_exact_with_means() -> None:
    w, _ = layer(3, 24, 1, torch.float32)
    w[1] = 0.75
    q = billm(w, Statistics(hessian=torch.eye(24)), block_size=12)[0].dequantize()
    torch.testing.assert_close(q[1], w[1], rtol=1e-6, atol=0)


def test_scales_beyond_float16_are_kept_in_float32() -> None:
    w, statistics = layer(3, 24, 1, torch.float32)
    tensor, rounded = billm(1e6 * w, statistics, W1_HALF)
    assert tensor.scale.dtype is torch.float32
    assert "do not fit float16; scales are stored in float32" in rounded.notes[0]
    with pytest.raises(ScaleDtypeError):
        stored([torch.tensor([[1e-9, 0.0]])], torch.float16)
    # A part's scale may round to 0 where the row has far larger ones.
    assert stored([torch.tensor([[1e-9, 1.0]])], torch.float16)[0].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("metric", ROUNDINGS["billm"]["metric"].words)
@pytest.mark.parametrize("variant", ROUNDINGS["billm"]["variant"].words)
def test_weights_of_any_size_have_the_same_signs_or_are_refused(variant: str, metric: str) -> None:
    """A power of two changes no rounding, until a square overflows."""
    w, statistics = layer(6, 64, 4, torch.float32)
    whole, _ = billm(w, statistics, variant=variant, metric=metric, block_size=32)
    refused = []
    for power in range(2, 127, 4):
        try:
            tensor, _ = billm(w * 2.0**power, statistics, variant=variant, metric=metric, block_size=32)
        except NonFiniteError:
            refused.append(power)
            continue
        assert torch.equal(tensor.dequantize(), whole.dequantize() * 2.0**power), power
    # w, or w²/U_jj² with U about 1, summed over 32 columns and squared, stays below 2^128.
    assert range(*((22, 28) if (variant, metric) == ("reference", "hessian") else (54, 60))).count(refused[0])
    assert len(refused) == len(range(refused[0], 127, 4))
    with pytest.raises(NonFiniteError, match="weights are too large for billm"):
        billm(w * 2.0**100, statistics, variant=variant, metric=metric)


def test_joint_is_a_method_of_its_own_name() -> None:
    w, statistics = layer(4, 40, 2, torch.float32)
    a = quantize_linear(w, method="billm_joint", bits=1, hessian=statistics.hessian)
    b = quantize_linear(w, method="billm", bits=1, hessian=statistics.hessian, variant="joint")
    assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"variant": "ours"}, "variant='ours' is not .* one of reference, paper, joint"),
        ({"metric": "l2"}, "metric='l2' is not .* one of hessian, magnitude"),
        ({"block_size": 0}, "block_size=0 is not .* from 1"),
        ({"salient_columns": -1}, "salient_columns=-1 is not .* from 0 or null"),
        ({"damp": -1.0}, "damp=-1.0 is not .* from 0"),
        ({"hessian": torch.eye(5)}, r"the Hessian has shape \(5, 5\)"),
        ({"bits": 2}, "billm does not make weight.bits=2; it makes 1"),
        ({"group_size": 8}, "billm does not work with weight.granularity=group; it works with channel"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_linear(torch.ones(2, 24), method="billm", **{"bits": 1, "hessian": torch.eye(24), **params})
    with pytest.raises(NonFiniteError):
        quantize_linear(torch.full((2, 24), float("nan")), method="billm", bits=1, hessian=torch.eye(24))


def test_an_indefinite_hessian_climbs_the_ladder_and_reports_the_damping() -> None:
    w, statistics = layer(4, 12, 0)
    statistics.hessian = torch.diag(torch.arange(1.0, 13.0))
    statistics.hessian[0, 1] = statistics.hessian[1, 0] = 1.9  # 1 · 2 < 1.9²; the mean of the diagonal is 6.5
    result = Billm(damp=0.001, block_size=6).quantize(w, statistics, W1)
    assert result.damp == pytest.approx(0.1)
    assert any("0.1 was used" in note for note in result.notes)
    assert torch.isfinite(result.tensor.dequantize()).all()
