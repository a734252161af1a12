"""SliM-LLM: the allocation against a plain loop, the range search against brute force, and what must hold on any data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import methods, quantize_linear
from quant.methods.base import Linear, Rounded
from quant.methods.slim_llm import ABSOLUTE_DAMP, Allocation, SlimLlm
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics, collect
from quant.tensors.mixed import MixedTensor
from tests.quant.golden_inputs import inputs, weight

BOTH = frozenset({"hessian", "samples"})


def scheme(bits: int, size: int, dtype: str = "float32", symmetric: bool = False) -> WeightScheme:
    return WeightScheme(bits, symmetric, Granularity.GROUP, size, dtype)


def problem(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Statistics]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 40, k, generator=g, dtype=dtype) * torch.linspace(0.2, 2, k, dtype=dtype)
    s = collect(x, BOTH)
    if dtype is torch.float64:  # the collected one is symmetric to float32 only
        s.hessian = 2 / 3 * torch.einsum("stk,stl->kl", x, x)
    return torch.randn(n, k, generator=g, dtype=dtype), s


def mixed(result: Rounded) -> MixedTensor:
    assert isinstance(result.tensor, MixedTensor)
    return result.tensor


def damped(h: Tensor, variant: str) -> Tensor:
    h, one = h.double(), torch.eye(len(h), dtype=torch.float64)
    if variant == "reference":
        h = h + ABSOLUTE_DAMP * one
    return h + 0.01 * h.diagonal().mean() * one


# --- allocation -----------------------------------------------------------------------------------------------------


def plain_group(w: list[float], bits: int, corrected: bool) -> list[float]:
    """One row of one group, in Python numbers."""
    if bits == 1:
        mean = sum(w) / len(w)
        scale = sum(abs(x - mean if corrected else x) for x in w) / len(w)
        return [mean + (scale if x >= mean else -scale) for x in w]
    low, high, top = min(0.0, *w), max(0.0, *w), 2**bits - 1
    step = (high - low) / top
    zero = round(-low / step)
    return [(min(max(round(x / step) + zero, 0), top) - zero) * step for x in w]


@pytest.mark.parametrize("variant", ["reference", "corrected"])
@pytest.mark.parametrize("objective", ["kl", "mse"])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_allocation_equals_a_plain_loop(bits: int, objective: str, variant: str) -> None:
    n, k, size = 5, 24, 4
    w, s = problem(n, k, 3, torch.float64)
    bias = torch.linspace(-2, 2, n, dtype=torch.float64)
    result = SlimLlm(objective=objective, variant=variant).quantize(w, s, scheme(bits, size), Linear(bias=bias))
    corrected = variant == "corrected"
    assert s.hessian is not None
    assert s.samples is not None
    raised = s.hessian.double() + 0.01 * torch.eye(k, dtype=torch.float64)
    # Independent of any factorization: U_jj² = [(H_{j:,j:})⁻¹]_jj.
    u2 = [float(torch.linalg.inv(raised[j:, j:])[0, 0]) for j in range(k)]
    salience = [sum(float(w[i, j]) ** 2 / u2[j] for i in range(n) for j in range(g * size, (g + 1) * size)) for g in range(k // size)]
    order = sorted(range(len(salience)), key=salience.__getitem__)
    x = s.samples.reshape(-1, k)
    target = x @ w.T + bias
    losses = {}
    for p in range(4) if corrected else range(1, 3):
        widths = [bits] * len(order)
        for g in order[:p]:
            widths[g] -= 1
        for g in order[len(order) - p :]:
            widths[g] += 1
        rows = [[plain_group(w[i, g * size : (g + 1) * size].tolist(), b, corrected) for g, b in enumerate(widths)] for i in range(n)]
        output = x @ torch.tensor(rows, dtype=torch.float64).view(n, k).T + (bias if corrected else 0)
        if objective == "mse":
            losses[str(p)] = float((output - target).square().mean())
        else:
            a, b = output.softmax(1).clamp(min=1e-6), target.softmax(1).clamp(min=1e-6)
            losses[str(p)] = float((a * (a.log() - b.log())).sum(1).mean())
    # Plain rounding keeps its scales in float32: half a unit of 2^-24 in each, and the errors of both objectives are of its order.
    assert result.details["allocation_loss"] == pytest.approx(losses, rel=1e-5)
    assert str(result.details["p"]) == min(losses, key=losses.__getitem__)


def test_as_many_groups_gain_a_bit_as_lose_one() -> None:
    for bits, variant in ((2, "corrected"), (5, "reference")):
        tensor = mixed(SlimLlm(variant=variant).quantize(weight(), collect(inputs(), BOTH), scheme(bits, 32)))
        assert tensor.widths.count(bits - 1) == tensor.widths.count(bits + 1)
        assert tensor.bits_nominal == bits


def test_few_groups_work_and_only_the_reference_variant_cannot_choose() -> None:
    w, s = problem(6, 24)
    for groups in (1, 2, 3):
        result = SlimLlm().quantize(w, s, scheme(3, 24 // groups))
        assert result.details["group_bits"] == [3] * groups
        assert "too few" in result.notes[0]
        corrected = SlimLlm(variant="corrected").quantize(w, s, scheme(3, 24 // groups))
        assert corrected.notes == []
        assert sum(corrected.details["group_bits"]) == 3 * groups
        assert list(corrected.details["allocation_loss"]) == ([] if groups == 1 else ["0", "1"])


def test_a_bit_list_replaces_the_search_and_gives_the_same_tensor() -> None:
    w, s = problem(6, 32)
    name = "model.layers.0.mlp.up_proj"
    searched = SlimLlm().quantize(w, s, scheme(2, 4), Linear(name))
    lists = json.loads(json.dumps({name: searched.details["group_bits"]}))
    for given_lists in (lists, tuple((k, tuple(v)) for k, v in lists.items())):  # as written, and as a spec keeps it
        again = methods.rounding("slim_llm", {"bit_lists": given_lists}).quantize(
            w, Statistics(hessian=s.hessian), scheme(2, 4), Linear(name)
        )
        assert all(torch.equal(a, b) for a, b in zip(searched.tensor.pack().values(), again.tensor.pack().values(), strict=True))


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({"other": [3]}, "bit_lists has no list for weight; it has other"),
        ({"weight": [3, 3, 3]}, "give 8 whole numbers, each 2, 3 or 4"),
        ({"weight": [3] * 7 + [5]}, "give 8 whole numbers, each 2, 3 or 4"),
        *[({"weight": bits}, "mapping to a list, each element a whole number from 1 to 8") for bits in ("q", 3, ["q"], [2.5], [True])],
    ],
)
def test_bit_lists_that_do_not_fit_are_refused(lists: Any, says: str) -> None:
    w, s = problem(6, 32)
    with pytest.raises(ValueError, match=says):
        methods.rounding("slim_llm", {"bit_lists": lists}).quantize(w, s, scheme(3, 4))


# --- ranges and solver ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lam", "sigma"), [(1.0, 2.0), (3.0, 2.0), (3.0, 3.0)])
def test_the_first_groups_range_is_the_best_of_101(lam: float, sigma: float) -> None:
    """The first group holds no updates yet, so brute force over the factors gives its scale and zero."""
    w, s = problem(7, 32, 4, torch.float64)
    w[2, 3] = 9.0
    tensor = mixed(SlimLlm(lam=lam, sigma=sigma, variant="corrected", bit_lists=(("weight", [3] * 4),)).quantize(w, s, scheme(3, 8)))
    assert s.hessian is not None
    h = damped(s.hessian, "corrected")
    u2 = torch.tensor([float(torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(8)], dtype=torch.float64)
    block = w[:, :8]
    share = block.square() / u2
    z = (share - share.mean()) / share.std()
    salient = share >= share[z.abs() > sigma].min()
    for i in range(7):
        best = (float("inf"), 0.0, 0)
        for p in [1 + 0.002 * t for t in range(51)] + [1 - 0.002 * t for t in range(1, 51)]:
            low, high = min(float(block[i].min()), 0.0) * p, max(float(block[i].max()), 0.0) * p
            step = float(torch.tensor((high - low) / 7, dtype=torch.float32))
            zero = round(-low / step)
            q = ((block[i] / step).round() + zero).clamp(0, 7)
            error = ((q - zero) * step - block[i]).abs() ** 2.4
            cost = float(error[~salient[i]].sum() + lam * error[salient[i]].sum())
            best = min(best, (cost, step, zero), key=lambda t: t[0])
        assert (float(tensor.scale[i, 0]), int(tensor.zero[i, 0])) == pytest.approx(best[1:], rel=1e-7)


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 5),
    groups=st.integers(1, 5),
    size=st.integers(1, 6),
    bits=st.integers(2, 7),
    variant=st.sampled_from(["reference", "corrected"]),
    seed=st.integers(0, 99),
)
def test_summed_errors_are_the_output_error(n: int, groups: int, size: int, bits: int, variant: str, seed: int) -> None:
    w, s = problem(n, groups * size, seed, torch.float64)
    result = SlimLlm(variant=variant).quantize(w, s, scheme(bits, size))
    d = w - mixed(result).values(torch.float64)
    assert s.hessian is not None
    torch.testing.assert_close(result.details["solver_loss"], float((d @ damped(s.hessian, variant) * d).sum()), rtol=1e-10, atol=1e-12)


def test_leading_narrow_groups_have_the_middle_zero_in_the_reference_variant_only() -> None:
    """Of a search; with a saved list the reference code makes every group asymmetric."""

    class Found(SlimLlm):
        def allocate(self, *arguments: Any) -> Allocation:
            return replace(super().allocate(*arguments), widths=(2, 2, 3, 2, 4, 3, 3, 4))

    w, s = problem(16, 32)
    w = w + 1.0  # zeros of their own are small then
    reference, corrected = (mixed(Found(variant=v).quantize(w, s, scheme(3, 4))) for v in ("reference", "corrected"))
    saved = mixed(SlimLlm(bit_lists=(("weight", (2, 2, 3, 2, 4, 3, 3, 4)),)).quantize(w, s, scheme(3, 4)))
    assert bool((reference.zero[:, :2] == 2).all())
    assert not bool((saved.zero[:, 0] == 2).all())
    assert not bool((reference.zero[:, 3] == 2).all())
    assert not bool((corrected.zero[:, 0] == 2).all())


def test_one_bit_groups_are_centred_in_the_corrected_variant() -> None:
    w = torch.tensor([[3.0, 5.0, 4.0, 4.5]])
    h = torch.eye(4)
    lists = (("weight", [1]),)
    reference, corrected = (
        mixed(SlimLlm(variant=v, bit_lists=lists).quantize(w, Statistics(hessian=h), scheme(2, 4))) for v in ("reference", "corrected")
    )
    mean = 4.125
    assert reference.values().tolist() == [[0.0, 2 * mean, 0.0, 2 * mean]]
    assert corrected.values().tolist() == [[mean - 0.625, mean + 0.625, mean - 0.625, mean + 0.625]]


def test_one_bit_groups_far_from_0_are_not_stored_in_a_type_that_loses_their_sides() -> None:
    w = 1 + 1e-4 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))  # float16 is 5e-4 apart below 1, 1e-3 above
    method = SlimLlm(variant="corrected", bit_lists=(("weight", [1]),))
    result = method.quantize(w, Statistics(hessian=torch.eye(8)), scheme(2, 8, "float16"))
    assert len(result.notes) == 1
    assert result.notes[0].endswith(" of 6 scales and means of 1-bit groups do not fit float16; scales are stored in float32")
    mean = w.mean(1, keepdim=True)
    want = mean + torch.where(w >= mean, 1.0, -1.0) * (w - mean).abs().mean(1, keepdim=True)
    torch.testing.assert_close(result.tensor.dequantize(), want, rtol=0, atol=2.0**-22)


@pytest.mark.parametrize(("variant", "lam"), [("reference", 1.0), ("corrected", 2.0)])
def test_degenerate_weights_work(variant: str, lam: float) -> None:
    w, s = problem(4, 16)
    h = s.hessian
    assert h is not None
    method = SlimLlm(variant=variant, lam=lam, bit_lists=(("weight", [1, 3, 2, 1]),))
    zeros = torch.zeros(4, 16)
    assert not mixed(method.quantize(zeros, s, scheme(2, 4))).dequantize().any()
    w[1] = 0
    assert not mixed(method.quantize(w, s, scheme(2, 4))).dequantize()[1].any()
    constant = torch.full((2, 16), -0.5)
    torch.testing.assert_close(mixed(method.quantize(constant, s, scheme(2, 4))).dequantize(), constant)
    for odd in (torch.zeros(16, 16), torch.ones(16, 16), h.index_fill(0, torch.tensor([5]), 0).index_fill(1, torch.tensor([5]), 0)):
        assert torch.isfinite(method.quantize(w, Statistics(hessian=odd), scheme(2, 4)).tensor.dequantize()).all()
    assert torch.isfinite(method.quantize(w[:1].half(), s, scheme(2, 4, "float16")).tensor.dequantize()).all()


def test_dead_inputs_are_zeroed_in_the_corrected_variant_and_unreached_ones_noted() -> None:
    w, s = problem(4, 16)
    assert s.samples is not None
    x = s.samples.clone()
    x[..., 5] = 0
    s = collect(x, BOTH)
    result = SlimLlm(variant="corrected").quantize(w, s, scheme(3, 4))
    assert result.notes == ["1 of 16 inputs are always 0 on the calibration text: their weights are set to 0"]
    assert not bool(result.tensor.dequantize()[:, 5].any())
    # Not even the bits depend on them: neither which groups count as salient nor what a candidate loses.
    loud = SlimLlm(variant="corrected").quantize(w.index_fill(1, torch.tensor([5]), 1e3), s, scheme(3, 4))
    assert loud.details == result.details
    assert torch.equal(loud.tensor.dequantize(), result.tensor.dequantize())
    unreached = SlimLlm().quantize(w, Statistics(hessian=torch.eye(16)), scheme(3, 4))
    assert unreached.notes == ["no calibration samples reached this input: all groups have 3 bits"]


def test_scales_beyond_float16_are_kept_in_float32_with_a_note() -> None:
    w, s = problem(4, 16)
    for factor in (1e-8, 1e6):
        for bits in (2, 4):
            result = SlimLlm().quantize(factor * w, s, scheme(bits, 4, "float16"))
            assert mixed(result).scale.dtype is torch.float32
            assert "stored in float32" in result.notes[-1]
            assert float((result.tensor.dequantize() - factor * w).norm() / (factor * w).norm()) < 0.8


def test_a_symmetric_scheme_uses_the_symmetric_grid() -> None:
    w, s = problem(4, 32)
    tensor = mixed(SlimLlm().quantize(w, s, scheme(3, 4, symmetric=True)))
    middles = torch.tensor([2 ** (b - 1) for b in tensor.widths], dtype=torch.uint8)
    assert torch.equal(tensor.zero, middles.expand(4, 8))


def test_parameters_and_schemes_that_do_not_fit_are_refused() -> None:
    w, s = problem(4, 32)
    with pytest.raises(ValueError, match=r"objective='l1' is not .* one of kl, mse"):
        SlimLlm(objective="l1")
    with pytest.raises(ValueError, match=r"variant='paper' is not .* one of reference, corrected"):
        SlimLlm(variant="paper")
    for wrong, says in ((WeightScheme(3), "granularity=channel"), (scheme(8, 4), r"weight\.bits=8"), (scheme(3, 5), "does not divide")):
        with pytest.raises(ValueError, match=says):
            SlimLlm().quantize(w, s, wrong)
    with pytest.raises(ValueError, match="needs data"):
        quantize_linear(w, method="slim_llm", bits=2, group_size=4)


def test_an_indefinite_hessian_climbs_the_ladder_and_reports_the_damping() -> None:
    w, s = problem(4, 16)
    s.hessian = torch.diag(torch.arange(1.0, 17.0))
    s.hessian[0, 1] = s.hessian[1, 0] = 1.9  # 1 · 2 < 1.9²; the mean of the diagonal is 8.5
    result = SlimLlm(damp=0.001, variant="corrected").quantize(w, s, scheme(3, 8))
    assert result.damp == pytest.approx(0.1)
    assert any("0.1 was used" in note for note in result.notes)
    assert torch.isfinite(result.tensor.dequantize()).all()
