"""Clipping by search: brute force over bounds, never worse than no clipping, on the error that is asked for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.grids import GRIDS, round_weight
from quant.methods import transform
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics, collect

GROUPED = WeightScheme(3, granularity=Granularity.GROUP, group_size=16, scale_dtype="float32")
CHANNEL = WeightScheme(3, scale_dtype="float32")


def data() -> tuple[Tensor, Statistics]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 48, generator=g) ** 3
    x = torch.randn(3, 40, 48, generator=g) @ torch.randn(48, 48, generator=g)
    return w, collect(x, frozenset({"hessian", "samples"}))


def clipped(name: str, w: Tensor, statistics: Statistics, scheme: WeightScheme, **params: Any) -> Tensor:
    out = transform(name, params).rewrite("weight", w, statistics, scheme)
    assert out is not None
    return out


def test_each_group_gets_the_best_of_all_bounds() -> None:
    w, statistics = data()
    for kind in ("symmetric", "asymmetric"):
        got = clipped("clip", w, statistics, GROUPED, kind=kind, steps=8)
        shares = [1 - i / 8 for i in range(4)]
        for n, g in itertools.product(range(6), range(3)):
            part = w[n : n + 1, 16 * g : 16 * g + 16]
            one = WeightScheme(3, scale_dtype="float32")
            errors = {}
            for p, q in itertools.product(shares, shares):
                if kind == "symmetric" and p != q:
                    continue
                m = part.abs().max()
                low, high = (-p * m, p * m) if kind == "symmetric" else (p * part.min(), q * part.max())
                c = part.clamp(low, high)
                errors[float((round_weight(GRIDS["g_asym"], c, one) - part).square().sum())] = c
            assert torch.equal(got[n, 16 * g : 16 * g + 16], errors[min(errors)][0])


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("scheme", [GROUPED, CHANNEL, WeightScheme(2, True), WeightScheme(4, granularity=Granularity.TENSOR)])
def test_weight_error_is_never_above_that_without_clipping(kind: str, scheme: WeightScheme) -> None:
    w, statistics = data()
    before = w.clone()
    grid = GRIDS["g_sym" if scheme.symmetric else "g_asym"]
    got = round_weight(grid, clipped("clip", w, statistics, scheme, kind=kind), scheme)
    plain = (round_weight(grid, w, scheme) - w).square().sum()
    assert float((got - w).square().sum()) < float(plain)
    assert torch.equal(w, before)


def test_two_bounds_are_never_worse_than_one_on_a_range_with_both_signs() -> None:
    """Where min and max are equally far the pairs hold all single bounds."""
    w, statistics = data()
    w[:, 0], w[:, 1] = -30, 30
    one, two = (
        float((round_weight(GRIDS["g_asym"], clipped("clip", w, statistics, CHANNEL, kind=k), CHANNEL) - w).square().sum())
        for k in ("symmetric", "asymmetric")
    )
    assert two <= one


@pytest.mark.parametrize("scheme", [GROUPED, CHANNEL])
def test_output_error_is_that_of_every_groups_share_of_the_output(scheme: WeightScheme) -> None:
    w, statistics = data()
    assert statistics.samples is not None
    x = statistics.samples.reshape(-1, 48)
    g = scheme.group_size or 48

    def shares(c: Tensor) -> Tensor:
        d = (round_weight(GRIDS["g_asym"], c, scheme) - w).view(6, -1, g)
        return torch.einsum("tgk,ngk->ngt", x.view(len(x), -1, g), d).square().sum(-1)

    by_output, by_weight = (clipped(n, w, statistics, scheme) for n in ("clip_output", "clip"))
    assert bool((shares(by_output) <= shares(w) * (1 + 1e-5)).all())
    assert bool((shares(by_output) <= shares(by_weight) * (1 + 1e-5)).all())
    assert float(shares(by_output).sum()) < 0.9 * float(shares(w).sum())


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", ["clip", "clip_output"])
def test_edges_work(kind: str, name: str) -> None:
    _, statistics = data()
    w = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    w[0], w[1], w[2], w[3] = 0, 0.7, w[2].abs() + 1, -(w[3].abs() + 1)
    got = clipped(name, w, statistics, GROUPED, kind=kind)
    assert torch.isfinite(got).all()
    assert torch.equal(got[0], w[0])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert clipped(name, w.to(dtype), statistics, GROUPED, kind=kind).dtype is (dtype if dtype is torch.float64 else torch.float32)


def test_wrong_parameters_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="kind=both is unknown; choose one of symmetric, asymmetric, or leave the transform out for none"):
        transform("clip", {"kind": "both"})
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        transform("clip", {"steps": 0})
    with pytest.raises(ValueError, match="clip_output needs the statistic hessian"):
        clipped("clip_output", data()[0], Statistics(), CHANNEL)
