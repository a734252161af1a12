"""Columns kept in float16 by GPTQ (OWQ, QUIK)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.accounting import bits_formula as affine_formula
from quant.affine import ZeroKind
from quant.methods.gptq import Gptq
from quant.methods.rtn import Rtn
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics, collect
from quant.tensors import unpack
from quant.tensors.affine import AffineTensor
from quant.tensors.columns import ColumnsTensor, bits_formula
from tests.quant.test_gptq import group_scheme, problem, proxy

SCHEMES = {
    "channel": WeightScheme(3, scale_dtype="float32"),
    "tensor": WeightScheme(3, granularity=Granularity.TENSOR, scale_dtype="float32"),
    "group": group_scheme(3, 6),
}
WAYS: list[dict[str, Any]] = [{}, {"act_order": True}, {"static_groups": True}, {"static_groups": True, "act_order": True}]


def kept(method: Gptq, w: Tensor, h: Tensor, scheme: WeightScheme) -> ColumnsTensor:
    tensor = method.quantize(w, Statistics(hessian=h), scheme).tensor
    assert isinstance(tensor, ColumnsTensor)
    return tensor


@pytest.mark.parametrize("size", [None, 12])
@pytest.mark.parametrize("planted", [[5], [5, 17, 18, 40]])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_planted_columns_are_found_exactly(bits: int, planted: list[int], size: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 48, generator=g), torch.randn(4, 100, 48, generator=g)
    scheme = WeightScheme(bits, scale_dtype="float32") if size is None else group_scheme(bits, size)
    for factor in (4, 16, 64) if size is None else (16, 64):
        scale = torch.ones(48)
        scale[planted] = factor
        # Larger weights; larger weights whose inputs are as much smaller (the function is the same); larger inputs.
        for new, inputs, metrics in ((w * scale, x, ["owq"]), (w * scale, x / scale, ["owq"]), (w, x * scale, ["owq", "quik"])):
            h = collect(inputs, frozenset({"hessian"})).hessian
            assert h is not None
            for metric in metrics:
                method = Gptq(outlier_columns=len(planted), outlier_metric=metric)
                assert kept(method, new, h, scheme).kept.tolist() == planted


def test_the_owq_score_is_the_hessians_diagonal_times_the_rounding_error() -> None:
    """Uniform weights: no column stretches a range, and the plain score's choice is taken."""
    g = torch.Generator().manual_seed(0)
    w = torch.rand(40, 24, generator=g) * 2 - 1
    h = torch.diag(torch.rand(24, generator=g) * 3 + 0.1)
    error = w - Rtn().quantize(w, Statistics(), SCHEMES["group"]).tensor.dequantize()
    score = [float(h[j, j]) * sum(float(e) ** 2 for e in error[:, j]) for j in range(24)]
    want = sorted(sorted(range(24), key=lambda j: -score[j])[:5])
    assert kept(Gptq(outlier_columns=5), w, h, SCHEMES["group"]).kept.tolist() == want


def test_owq_leaves_no_more_than_the_plain_score() -> None:
    """Error of plain rounding without the kept columns, against the choice of the plain score, on weights of all kinds."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(8, 24, generator=g) * torch.exp(torch.randn(24, generator=g))
        diagonal = torch.exp(2 * torch.randn(24, generator=g))
        scheme = WeightScheme(3, scale_dtype="float32")

        def left_over(columns: list[int], w: Tensor = w, diagonal: Tensor = diagonal, scheme: WeightScheme = scheme) -> float:
            rest = [j for j in range(24) if j not in columns]
            e = w[:, rest] - Rtn().quantize(w[:, rest], Statistics(), scheme).tensor.dequantize()
            return float((e.square().sum(0) * diagonal[rest]).sum())

        score = (w - Rtn().quantize(w, Statistics(), scheme).tensor.dequantize()).square().sum(0) * diagonal
        plain = torch.argsort(score, descending=True)[:3].tolist()
        ours = kept(Gptq(outlier_columns=3), w, torch.diag(diagonal), scheme).kept.tolist()
        assert left_over(ours) <= left_over(plain) * (1 + 1e-6)


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("metric", ["owq", "quik"])
def test_kept_columns_take_up_the_errors_of_the_others(name: str, ways: dict[str, Any], metric: str) -> None:
    better = 0
    for seed in range(8):
        w, _, h = problem(6, 24, seed)
        tensor = kept(Gptq(outlier_columns=4, outlier_metric=metric, **ways), w, h, SCHEMES[name])
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(24, dtype=h.dtype)
        # With the coded columns fixed, the kept ones (last in order) are the least-squares optimum up to float16.
        d = (tensor.dequantize().double() - w).T
        free = torch.zeros(24, dtype=torch.bool)
        free[tensor.kept] = True
        best = w.T[free] - torch.linalg.solve(damped[free][:, free], damped[free][:, ~free] @ d[~free])
        # A column also makes up for the float16 errors (2^-11 of at most 4) of those kept before it.
        torch.testing.assert_close(tensor.kept_values.double(), best.T, rtol=0, atol=8e-3)
        plain = Gptq(**ways).quantize(w, Statistics(hessian=h), SCHEMES[name]).tensor.dequantize()
        better += proxy(w, tensor.dequantize(), h) < proxy(w, plain, h)
    assert better >= 7


@pytest.mark.parametrize("grid", ["g_asym", "kivi"])
@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_groups_keep_their_columns_and_ranges_leave_the_kept_ones_out(ways: dict[str, Any], grid: str) -> None:
    w, _, _ = problem(6, 24, 2, dtype=torch.float32)
    w += 20 * (grid == "kivi")  # whose ranges need not hold 0: nothing else may stand for a kept column either
    h = torch.diag(torch.linspace(2, 1, 24))  # diagonal: nothing is spread, and the order of the others is the plain one
    h[1, 1] = h[8, 8] = 3
    w[:, [1, 8]] = 1e3
    tensor = kept(Gptq(outlier_columns=2, outlier_metric="quik", grid=grid, **ways), w, h, SCHEMES["group"])
    assert tensor.kept.tolist() == [1, 8]
    assert torch.equal(tensor.kept_values, w[:, [1, 8]].half())
    rest = [j for j in range(24) if j not in (1, 8)]
    got = tensor.dequantize()
    # Reference: each group rounded without its kept column; with act-order and dynamic groups, groups are cut after it is gone.
    permuted = ways.get("act_order") and not ways.get("static_groups")
    cuts = [rest[i : i + 6] for i in range(0, 22, 6)] if permuted else [[j for j in rest if j // 6 == g] for g in range(4)]
    for columns in cuts:
        alone = Rtn(grid=grid).quantize(w[:, columns], Statistics(), WeightScheme(3, scale_dtype="float32")).tensor.dequantize()
        torch.testing.assert_close(got[:, columns], alone)


@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_a_group_kept_as_a_whole_works(ways: dict[str, Any]) -> None:
    w, _, h = problem(4, 12, 0, dtype=torch.float32)
    h[:6, :6] += 1e5 * torch.eye(6)
    tensor = kept(Gptq(outlier_columns=7, outlier_metric="quik", **ways), w, h, group_scheme(4, 6))
    assert tensor.kept.tolist()[:6] == list(range(6))
    assert torch.isfinite(tensor.dequantize()).all()


def test_without_outliers_it_is_plain_gptq() -> None:
    w, _, h = problem(4, 24, 0, dtype=torch.float32)
    for scheme in SCHEMES.values():
        a, b = (Gptq(outlier_columns=0, outlier_metric=m).quantize(w, Statistics(hessian=h), scheme).tensor for m in ("owq", "quik"))
        assert isinstance(a, AffineTensor)
        assert torch.equal(a.dequantize(), b.dequantize())


def test_dead_inputs_are_not_kept() -> None:
    w, x, _ = problem(4, 12, 2, dtype=torch.float32)
    x = 1e-3 * x
    x[:, 5] = 0  # counts as 1 in the solver, far above all others
    h = 2 * x.T @ x
    for metric in ("owq", "quik"):
        assert 5 not in kept(Gptq(outlier_columns=3, outlier_metric=metric), w, h, SCHEMES["channel"]).kept


@pytest.mark.parametrize("metric", ["owq", "quik"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", ["channel", "group"])
def test_packing_is_exact_and_as_large_as_the_formula_says(kind: str, act_order: bool, metric: str) -> None:
    w, _, h = problem(16, 24, 3, dtype=torch.float32)
    tensor = kept(Gptq(outlier_columns=3, outlier_metric=metric, act_order=act_order), w, h, SCHEMES[kind])
    assert tensor.exact_inputs is (metric == "quik")
    for t in (tensor, tensor.with_input_scale(torch.linspace(0.5, 2, 24))):
        again = unpack(t.format, t.pack(), json.loads(json.dumps(t.meta())))
        assert isinstance(again, ColumnsTensor)
        assert again.exact_inputs is t.exact_inputs
        assert torch.equal(again.dequantize(), t.dequantize())
        assert all(torch.equal(a, b) for a, b in zip(again.pack().values(), t.pack().values(), strict=True))
    torch.testing.assert_close(
        tensor.with_input_scale(torch.linspace(0.5, 2, 24)).dequantize(), tensor.dequantize() / torch.linspace(0.5, 2, 24)
    )
    base = affine_formula(SCHEMES[kind], (16, 24), ZeroKind.CODE)
    index = 8 * 24 if act_order and kind == "group" else 0
    assert 0 <= (tensor.bits_stored - bits_formula(base, 3, (16, 24))) * 16 * 24 - index <= 8 * len(tensor.pack())
    assert tensor.bits_nominal == 3 + 16 * 3 / 24


@pytest.mark.parametrize("k", [2**15, 2**15 + 1])
def test_the_last_of_many_columns_is_kept_where_it_is(k: int) -> None:
    rest = Rtn().quantize(torch.randn(1, k, generator=torch.Generator().manual_seed(0)), Statistics(), WeightScheme(4)).tensor
    assert isinstance(rest, AffineTensor)
    tensor = ColumnsTensor(rest, torch.tensor([0, k - 1]), torch.tensor([[100.0, 200.0]]))
    again = unpack(tensor.format, tensor.pack(), tensor.meta()).dequantize()
    assert again[0, [0, -1]].tolist() == [100, 200]
    assert torch.equal(again[:, 1:-1], rest.dequantize()[:, 1:-1])


def test_values_beyond_float16_are_kept_in_float32_with_a_note() -> None:
    w, _, h = problem(4, 24, 0, dtype=torch.float32)
    w[:, 3] = 1e6
    h[3, 3] += 1e5
    result = Gptq(outlier_columns=1, outlier_metric="quik").quantize(w, Statistics(hessian=h), SCHEMES["channel"])
    assert isinstance(result.tensor, ColumnsTensor)
    assert result.tensor.kept_values.dtype is torch.float32
    assert torch.isfinite(result.tensor.dequantize()).all()
    assert result.notes == ["float16 does not hold the kept columns: they are stored in float32"]


def test_wrong_numbers_of_columns_are_refused() -> None:
    w, _, h = problem(4, 24, 0, dtype=torch.float32)
    with pytest.raises(ValueError, match="outlier_columns=24 of 24 inputs leaves none to quantize; give 0 to 23"):
        quantize_linear(w, method="owq", bits=3, hessian=h, outlier_columns=24)
    with pytest.raises(ValueError, match="outlier_columns=-1"):
        Gptq(outlier_columns=-1)
    with pytest.raises(ValueError, match="outlier_metric='awq' is not a value for gptq; give one of owq, quik"):
        Gptq(outlier_metric="awq")
