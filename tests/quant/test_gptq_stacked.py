"""Linears that read one input, rounded in one call: what each has alone, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.kernels import TABLE, kernel, recorded
from quant.methods import gptq_ranges
from quant.methods.gptq import Gptq
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from tests.quant.stacking import are_alone

K = 96
CHANNEL = WeightScheme(4)
G16, G32 = (WeightScheme(4, granularity=Granularity.GROUP, group_size=size) for size in (16, 32))
NF4 = replace(G32, number="nf4", symmetric=True)
SCHEMES = {
    "one": [G16, G16, G16],
    "bits": [replace(G32, bits=2), replace(G32, bits=8), replace(G32, bits=3)],
    "widths": [replace(G16, bits=3), G32, replace(CHANNEL, bits=2)],
    "others": [WeightScheme(3, granularity=Granularity.TENSOR), replace(G16, symmetric=True), replace(G16, scale_dtype="float32")],
}


def given(rows: tuple[int, ...] = (32, 16, 48), dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Statistics]:
    g = torch.Generator().manual_seed(K)
    x = torch.randn(300, K, generator=g) @ (torch.eye(K) + 0.1 * torch.randn(K, K, generator=g))
    x[:, 7] = 0  # an input that never fires
    return [torch.randn(n, K, generator=g).to(dtype) for n in rows], Statistics(hessian=x.T @ x)


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_each_is_what_it_is_alone(schemes: list[WeightScheme], static_groups: bool, act_order: bool) -> None:
    method = Gptq(static_groups=static_groups, act_order=act_order, block_size=32)
    weights, statistics = given()
    are_alone(method, weights, statistics, schemes)


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_read_as_they_are(schemes: list[WeightScheme], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: laid out by columns once, their ranges found by the least and largest of each group."""
    weights, statistics = given(dtype=dtype)
    method = Gptq(static_groups=True, block_size=32)
    want = method.quantize_stacked(weights, statistics, schemes)
    monkeypatch.setattr(gptq_ranges, "on_gpu", lambda t: True)
    with recorded() as kernels:
        got = method.quantize_stacked(weights, statistics, schemes)
    assert "turned" in kernels
    for one, other in zip(got, want, strict=True):
        mine, theirs = one.tensor.pack(), other.tensor.pack()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert (one.notes, one.damp) == (other.notes, other.damp)


@pytest.mark.gpu("nvcc")
@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("method", [Gptq(act_order=True), Gptq(static_groups=True)], ids=["act-order", "static"])
def test_each_is_what_it_is_alone_on_a_gpu(schemes: list[WeightScheme], method: Gptq) -> None:
    """Rows as queries, keys and values of a grouped model have them, columns of several blocks."""
    g = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(n, 1056, generator=g, device="cuda").bfloat16() for n in (2048, 256, 256)]
    x = torch.randn(2000, 1056, generator=g, device="cuda")
    statistics = Statistics(hessian=x.T @ x)
    assert method.stacks(weights, schemes)
    for weight, scheme, got in zip(weights, schemes, method.quantize_stacked(weights, statistics, schemes), strict=True):
        mine, alone = got.tensor.pack(), method.quantize(weight, statistics, scheme).tensor.pack()
        assert all(torch.equal(mine[name], alone[name]) for name in alone)


@pytest.mark.parametrize("schemes", [SCHEMES["widths"], SCHEMES["others"]], ids=["widths", "others"])
def test_ranges_that_launches_find_are_those_of_torch(schemes: list[WeightScheme], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is the same, and the record says where torch finds them: of what a launch cannot, as if any range were odd here."""
    weights, statistics = given()
    method = Gptq(act_order=True, block_size=32)
    with recorded() as kernels:
        launched = method.quantize_stacked(weights, statistics, schemes)
    assert set(kernels) == {"gptq_block", "lazy_update"}
    monkeypatch.setattr(gptq_ranges.StackedRanges, "odd", lambda self: self.fits is not None)
    with recorded() as kernels:
        by_torch = method.quantize_stacked(weights, statistics, schemes)
    assert kernels["gptq_block_ranges"] == ["torch"]
    for one, other in zip(launched, by_torch, strict=True):
        mine, theirs = one.tensor.pack(), other.tensor.pack()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert one.notes == other.notes


@pytest.mark.parametrize(
    ("method", "size"), [(Gptq(mse=True), 16), (Gptq(block_size=32), 96), (Gptq(outlier_columns=1), 16)], ids=["search", "wide", "kept"]
)
def test_ranges_that_no_launch_finds_are_recorded(method: Gptq, size: int) -> None:
    weights, statistics = given()
    with recorded() as kernels:
        method.quantize(weights[1], statistics, replace(G16, group_size=size))
    assert kernels["gptq_block_ranges"] == ["torch"]


def test_every_block_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernel("gptq_block").run
    solve, seen = run.solve_block, []
    monkeypatch.setattr(run, "solve_block", lambda block, *more: (seen.append(tuple(block.shape)), solve(block, *more))[1])
    weights, statistics = given()
    Gptq(block_size=32).quantize_stacked(weights, statistics, SCHEMES["bits"])
    assert seen == [(32, 96)] * 3


def test_what_is_not_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = given()
    three = [G16] * 3
    assert not Gptq(outlier_columns=2).stacks(weights, three), "each keeps columns of its own"
    assert not Gptq().stacks(weights, [G16, G16, NF4]), "that is not rounded in blocks"
    assert not Gptq(grid="hqq").stacks(weights, [G16, G16, replace(G16, symmetric=True)]), "zeros are of two kinds"
    assert not Gptq().stacks(given((32, 16, 5))[0], three), "rows do not fill vectors"
    assert not Gptq().stacks([*weights[:2], weights[2].double()], three)
    monkeypatch.setitem(TABLE, "gptq_block", {"torch": TABLE["gptq_block"]["torch"]})
    assert not Gptq().stacks(weights, three), "torch rounds by where a number lies"


def test_scales_that_one_of_them_does_not_hold_are_said() -> None:
    weights, statistics = given()
    weights[1] *= 1e7
    with pytest.raises(ScaleDtypeError):
        Gptq().quantize_stacked(weights, statistics, [G16] * 3)
