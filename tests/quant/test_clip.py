"""Clipping: brute force over bounds, learned ≤ asymmetric ≤ none on the error that is asked for, gradients, none as without it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.grids import GRIDS, fit, round_weight
from quant.methods import transform
from quant.methods.clip import Clip
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


HALF = WeightScheme(3, granularity=Granularity.GROUP, group_size=16, scale_dtype="float16")


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(GROUPED, "clip_output"), (CHANNEL, "clip"), (CHANNEL, "clip_output"), (HALF, "clip"), (WeightScheme(2, True), "clip")],
)
def test_learned_is_at_most_asymmetric_and_asymmetric_at_most_none(scheme: WeightScheme, name: str) -> None:
    """For every row and group, on the error that the transform has; also with a learning rate that ruins it."""
    w, statistics = data()
    assert statistics.hessian is not None
    g = scheme.group_size or 48
    blocks = torch.stack([statistics.hessian[i : i + g, i : i + g] for i in range(0, 48, g)]).double()
    grid = GRIDS["g_sym" if scheme.symmetric else "g_asym"]

    def errors(c: Tensor) -> Tensor:
        d = (round_weight(grid, c, scheme).double() - w.double()).view(6, -1, g)
        return d.square().sum(-1) if name == "clip" else torch.einsum("ngi,gij,ngj->ng", d, blocks, d)

    none, asymmetric = errors(w), errors(clipped(name, w, statistics, scheme, steps=8))
    learned = errors(clipped(name, w, statistics, scheme, kind="learned", steps=8, iters=20, lr=0.05))
    ruined = errors(clipped(name, w, statistics, scheme, kind="learned", steps=8, iters=3, lr=50.0))
    # The choice is made in float32, by sums of g (g² for the output error) terms of one sign: relative error below g 2^-24 each way.
    slack = 1 + 2 * g * 2**-24
    assert bool((asymmetric <= none * slack).all())
    assert bool((learned <= asymmetric * slack).all())
    assert bool((ruined <= asymmetric * slack).all())
    assert float(learned.sum()) < float(asymmetric.sum()) < float(none.sum())


@pytest.mark.parametrize("name", ["clip", "clip_output"])
def test_gradients_of_learned_bounds_against_finite_differences(name: str) -> None:
    """Reference: the clipped range's quantizer written out, its two roundings and the cast of the scale held at their values."""
    w, statistics = (data()[0].double() / 4, data()[1])
    assert statistics.hessian is not None
    g = w.view(6, 3, 16)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    assert bool((low < 0).all() and (high > 0).all())
    at = torch.randn(2, 6, 3, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    blocks = torch.stack([statistics.hessian[i : i + 16, i : i + 16] for i in (0, 16, 32)]).double()

    def cost(values: Tensor) -> Tensor:
        d = values - g
        return d.square().sum() if name == "clip" else torch.einsum("ngi,gij,ngj->", d, blocks, d)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q = torch.sigmoid(logits)
        return (q * high - p * low) / 7, p * low, torch.minimum(torch.maximum(g, p * low), q * high)

    exact, bound, c = parts(at)
    s = exact.float().double()
    cast, z, r = s - exact, (-bound / s).round() - -bound / s, (c / s).round() - c / s
    codes = (c / s).round() + (-bound / s).round()

    def frozen(logits: Tensor) -> Tensor:
        exact, bound, c = parts(logits)
        s = exact + cast
        zero = -bound / s + z
        return cost((torch.where((codes >= 0) & (codes <= 7), c / s + r + zero, codes.clamp(0, 7)) - zero) * s)

    clip, logits = transform(name, {"kind": "learned"}), at.clone().requires_grad_()
    assert isinstance(clip, Clip)
    rounded = clip.soft(g, logits, GROUPED, torch.float32)[2]
    error = clip._errors(g, statistics, GROUPED)(rounded - g).sum()
    assert float(error.detach()) == pytest.approx(float(frozen(at)), rel=1e-10)
    error.backward()
    assert logits.grad is not None
    for i in range(0, at.numel(), 5):
        move = torch.zeros(at.numel(), dtype=torch.float64).index_fill_(0, torch.tensor(i), 1e-6).view_as(at)
        want = float(frozen(at + move) - frozen(at - move)) / 2e-6
        assert float(logits.grad.view(-1)[i]) == pytest.approx(want, rel=1e-5, abs=1e-7 * float(logits.grad.abs().max()))


def test_rows_may_be_learned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w, statistics = data()
    quick = {"kind": "learned", "steps": 2, "iters": 4}
    whole = clipped("clip", w, statistics, HALF, **quick)
    monkeypatch.setattr("quant.methods.clip.LEARNED_VALUES", 2 * 48)
    assert torch.equal(clipped("clip", w, statistics, HALF, **quick), whole)


def test_bounds_whose_scale_float16_cannot_hold_are_not_taken() -> None:
    """One row's would cost all rows their float16: it has the least scale of 2 bits, 2^-22, and 2^-22.4 would be best for all but one
    of its weights."""
    w, statistics = data()
    w[0] = (torch.linspace(-0.35, 0.35, 48).index_fill(0, torch.tensor(47), 0.65)) * 3 * 2.0**-22
    scheme = WeightScheme(2, scale_dtype="float16")
    learned = clipped("clip", w, statistics, scheme, kind="learned", steps=1, iters=20, lr=0.3)
    assert not torch.equal(learned, w)
    fit(GRIDS["g_asym"], learned, 2, torch.float16)  # raises where a scale does not fit


def test_none_is_as_if_the_transform_were_not_there() -> None:
    w, statistics = data()
    for name in ("clip", "clip_output"):
        assert transform(name, {"kind": "none"}).rewrite("weight", w, statistics, GROUPED) is None
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
    payloads = [
        quantize_linear(w, method=m, bits=3, group_size=16, inputs=x, **more).pack()
        for m, more in (("gptq", {}), ("clip_gptq", {"kind": "none"}), ("clip_gptq", {"kind": "learned", "iters": 2}))
    ]
    assert all(torch.equal(payloads[0][k], payloads[1][k]) for k in payloads[0])
    assert not all(torch.equal(payloads[0][k], payloads[2][k]) for k in payloads[0])


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_searches_do_not_read_what_learning_reads(kind: str) -> None:
    w, statistics = data()
    assert torch.equal(
        clipped("clip", w, statistics, GROUPED, kind=kind, steps=4),
        clipped("clip", w, statistics, GROUPED, kind=kind, steps=4, iters=1, lr=9.0),
    )


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "learned"])
@pytest.mark.parametrize("name", ["clip", "clip_output"])
def test_edges_work(kind: str, name: str) -> None:
    _, statistics = data()
    w = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    w[0], w[1], w[2], w[3] = 0, 0.7, w[2].abs() + 1, -(w[3].abs() + 1)
    quick = {"kind": kind, "steps": 8, "iters": 10}
    got = clipped(name, w, statistics, GROUPED, **quick)
    assert torch.isfinite(got).all()
    assert torch.equal(got[0], w[0])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert clipped(name, w.to(dtype), statistics, GROUPED, **quick).dtype is (dtype if dtype is torch.float64 else torch.float32)


def test_wrong_parameters_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"kind='both' is not .* one of none, symmetric, asymmetric, learned"):
        transform("clip", {"kind": "both"})
    with pytest.raises(ValueError, match=r"steps=0 is not .* from 1"):
        transform("clip", {"steps": 0})
    with pytest.raises(ValueError, match=r"iters=0 is not .* from 1"):
        transform("clip", {"iters": 0})
    with pytest.raises(ValueError, match="clip_output needs the statistic hessian"):
        clipped("clip_output", data()[0], Statistics(), CHANNEL)
