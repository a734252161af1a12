"""GPTQ's columns pulled up to date, a span at a time, are those that pushing every block's errors gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.factors import inverse_factor, provided_factors, pull_factor
from quant.kernels import kernel
from quant.kernels.lazy_update import eager, triton
from quant.methods import gptq_ranges
from quant.methods.base import Rounded
from quant.methods.gptq import Gptq
from quant.replay import Replays, replaying
from quant.scheme import Granularity, WeightScheme
from quant.solver import Solved, solve_affine
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from tests.quant.test_replay import Captures, enough, same, values_asked_for

K, BLOCK = 112, 16
SPANS = (1, 2, 3, 6)
"""Blocks: K is a multiple of one, and of no more."""
Scheme = partial(WeightScheme, granularity=Granularity.GROUP, scale_dtype="float32")
SCHEMES = {
    "rows": [WeightScheme(3, scale_dtype="float32")],
    "tensor": [WeightScheme(4, granularity=Granularity.TENSOR, scale_dtype="float32")],
    "groups": [Scheme(4, group_size=8)],
    "mixed": [Scheme(4, group_size=16), Scheme(2, group_size=8), WeightScheme(3, scale_dtype="float32")],
}
METHODS = {
    "dynamic": Gptq(block_size=BLOCK),
    "static": Gptq(block_size=BLOCK, static_groups=True),
    "ordered": Gptq(block_size=BLOCK, act_order=True),
    "static, ordered": Gptq(block_size=BLOCK, act_order=True, static_groups=True),
    "searched, damped": Gptq(block_size=BLOCK, mse=True, damp=0.1),
    "blocks that do not divide": Gptq(block_size=48),
}
GPU = pytest.mark.gpu("triton")
Pull = Callable[[int | None], None]


@pytest.fixture
def pull(monkeypatch: pytest.MonkeyPatch) -> Pull:
    """Has solvers on a CPU pull spans of so many columns; None: push."""
    run = kernel("lazy_update", "torch").run
    return lambda span: monkeypatch.setattr(run, "span", lambda block, device: span)


def given(count: int, dtype: torch.dtype, k: int = K, rows: int = 48, seed: int = 0) -> tuple[list[Tensor], Statistics]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * k, k, generator=g, dtype=dtype) @ (torch.eye(k, dtype=dtype) + 0.1 * torch.randn(k, k, generator=g, dtype=dtype))
    return [torch.randn(rows, k, generator=g, dtype=dtype) for _ in range(count)], Statistics(hessian=x.T @ x)


def packed(method: Gptq, weights: list[Tensor], statistics: Statistics, schemes: list[WeightScheme]) -> list[dict[str, Tensor]]:
    if len(weights) == 1:
        return [method.quantize(weights[0], statistics, schemes[0]).tensor.pack()]
    return [r.tensor.pack() for r in method.quantize_stacked(weights, statistics, schemes)]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
def test_codes_and_ranges_are_those_of_pushing(method: Gptq, schemes: list[WeightScheme], pull: Pull) -> None:
    """In float64, where no code is at stake; ranges that are found on the way differ by roundings before float32 stores them."""
    weights, statistics = given(len(schemes), torch.float64)
    pull(None)
    want = packed(method, weights, statistics, schemes)
    for blocks in SPANS:
        pull(blocks * method.block_size)
        assert same(packed(method, weights, statistics, schemes), want)


@pytest.mark.parametrize("blocks", SPANS)
def test_stacked_weights_have_the_bits_that_each_has_alone(blocks: int, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are told of the stack: where libraries do not sum alike, a test cannot rely on it."""
    weights, statistics = given(3, torch.float32)
    run, stacks = kernel("lazy_update", "torch").run, list[Sequence[int] | None]()
    update = run.lazy_update
    monkeypatch.setattr(
        run, "lazy_update", lambda later, left, right, stack=None: (stacks.append(stack), update(later, left, right, stack))
    )
    pull(blocks * BLOCK)
    method = METHODS["dynamic"]
    assert method.stacks(weights, SCHEMES["mixed"])
    together = packed(method, weights, statistics, SCHEMES["mixed"])
    assert stacks
    assert all(stack == [48] * 3 for stack in stacks)
    alone = [packed(method, [w], statistics, [s])[0] for w, s in zip(weights, SCHEMES["mixed"], strict=True)]
    assert same(together, alone)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not filled holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
def test_summed_errors_are_the_output_error(pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    [weight], statistics = given(1, torch.float64)
    made: list[Solved] = []

    def solve(*more: Any, **named: Any) -> Solved:
        made.append(solve_affine(*more, **named))
        return made[-1]

    monkeypatch.setattr("quant.methods.gptq.solve_affine", solve)
    pull(32)
    Gptq(block_size=BLOCK, damp=0.01).quantize(weight, statistics, SCHEMES["groups"][0])
    hessian = statistics.hessian
    assert hessian is not None
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    missed = weight - made[-1].values.T
    torch.testing.assert_close(made[-1].loss, ((missed @ damped) * missed).sum(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("whole", [True, False], ids=["kernels that give values", "that skip them"])
def test_weights_that_are_read_as_they_are_and_loops_that_are_replayed(whole: bool, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: queued, captured, replayed."""
    inputs = [given(2, torch.float32, seed=seed) for seed in range(3)]
    schemes, method = [WeightScheme(4)] * 2, METHODS["static"]
    pull(48)
    want = [packed(method, *one, schemes) for one in inputs]
    assert not any(same(one, want[0]) for one in want[1:])
    monkeypatch.setattr(gptq_ranges, "on_gpu", lambda t: True)
    asked = [] if whole else values_asked_for(monkeypatch)
    with replaying(Replays(Captures(), enough)):
        for _ in range(2):
            assert all(same(packed(method, *one, schemes), made) for one, made in zip(inputs, want, strict=True))
    # Spans of three blocks of two weights' 48 rows, and of the last span's one block none.
    assert asked[:7] == ([] if whole else [*[BLOCK * 2 * 48] * 6, 0])


FORMS = {
    "whole rows": (Gptq(), WeightScheme(4), "pull_factor of 512"),
    "groups in blocks": (Gptq(), Scheme(4, group_size=64), "pull_factor of 512"),
    "static groups": (Gptq(static_groups=True), Scheme(4, group_size=256), "pull_factor of 512"),
    "blocks of another size": (Gptq(block_size=96), WeightScheme(4), "pull_factor of 480"),
    "large blocks": (Gptq(block_size=640), WeightScheme(4), "pull_factor of 640"),
    "groups that straddle blocks": (Gptq(), Scheme(4, group_size=96), "inverse_factor"),
    "groups wider than a block": (Gptq(), Scheme(4, group_size=256), "inverse_factor"),
    "kept columns": (Gptq(outlier_columns=2), WeightScheme(4), "inverse_factor"),
    "a number format": (Gptq(), WeightScheme(4, True, Granularity.GROUP, 32, number="mxfp4"), "inverse_factor"),
}


@pytest.mark.parametrize(("method", "scheme", "form"), FORMS.values(), ids=FORMS)
def test_which_factor_is_asked_for(method: Gptq, scheme: WeightScheme, form: str) -> None:
    assert asked_for(method, scheme, 768) == [form]


def test_one_span_is_solved_by_the_factor_of_all_methods() -> None:
    assert asked_for(Gptq(), WeightScheme(4), 512) == ["inverse_factor"]


def asked_for(method: Gptq, scheme: WeightScheme, k: int) -> list[str]:
    [weight], statistics = given(1, torch.float32, k=k, rows=2)
    asked: list[str] = []

    def provide(form: str, hessian: Tensor, damp: float, make: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float]:
        asked.append(form)
        return make()

    with provided_factors(provide):
        method.quantize(weight, statistics, scheme)
    return asked


def test_where_spans_are_pulled() -> None:
    """On a GPU, what that takes is not measured."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [eager.span(block, cpu) for block in (128, 96, 640)] == [512, 480, 640]
    assert eager.span(128, gpu) is triton.span(128, gpu) is None


def test_ranges_that_a_launch_could_not_find_are_pulled_too(pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, statistics = given(3, torch.float32)
    pull(32)
    found = packed(METHODS["dynamic"], weights, statistics, SCHEMES["mixed"])
    monkeypatch.setattr(gptq_ranges.StackedRanges, "odd", lambda self: self.fits is not None)
    assert same(packed(METHODS["dynamic"], weights, statistics, SCHEMES["mixed"]), found)


def test_loops_of_another_form_are_not_replayed() -> None:
    """Of the same shapes and settings, P first and then U."""
    [weight], statistics = given(1, torch.float32)
    hessian = statistics.hessian
    assert hessian is not None
    scale = weight.abs().amax(1) / 7
    affine = Affine(scale[None], torch.full_like(scale, 8)[None], 4, ZeroKind.CONSTANT)
    factors = ((pull_factor(hessian, 0.01, 32)[0].contiguous(), 32), (inverse_factor(hessian, 0.01)[0].contiguous(), None))

    def codes(upper: Tensor, span: int | None) -> Tensor:
        columns = weight.T.contiguous()
        return solve_affine(columns, upper, BLOCK, ranges, spends=True, looks_ahead=False, span=span).codes.clone()

    def ranges(start: int, end: int, weights: Tensor) -> tuple[Affine, list[int]]:
        return affine, [0] * (end - start)

    want = [codes(*factor) for factor in factors]
    with replaying(Replays(Captures(), enough)):
        for _ in range(3):
            assert all(torch.equal(codes(*factor), made) for factor, made in zip(factors, want, strict=True))


def test_what_looks_ahead_and_what_does_not_are_not_stacked() -> None:
    weights, _ = given(2, torch.float32)
    narrow, wide = Scheme(4, group_size=16), Scheme(4, group_size=56)
    method = METHODS["dynamic"]
    assert method.stacks(weights, [narrow, narrow])
    assert method.stacks(weights, [wide, wide])
    assert not method.stacks(weights, [narrow, wide])


@pytest.mark.parametrize("place", [pytest.param(("torch", "cpu"), id="cpu"), pytest.param(("triton", "cuda"), id="gpu", marks=GPU)])
@pytest.mark.parametrize("static", [True, False])
def test_in_float32_few_rows_have_a_code_that_float64_does_not_give(
    place: tuple[str, str], static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code that differs takes the rest of its row along: rows are counted. Of 256, 0 to 2 did, 0.33 in the mean of 72 runs (pushed or
    pulled, of several spans, on one thread or two); of Poisson's distribution with mean 1, 7e-11 lies above 12. On a GPU, loops with
    ranges that are known are captured and replayed."""
    backend, device = place
    [weight], statistics = given(1, torch.float64, k=2304, rows=256)
    method, scheme, hessian = Gptq(static_groups=static), Scheme(4, group_size=128), statistics.hessian
    assert hessian is not None
    monkeypatch.setattr(kernel("lazy_update", "torch").run, "span", lambda block, device: None)
    want = codes(method.quantize(weight, statistics, scheme))
    monkeypatch.setattr(kernel("lazy_update", backend, device).run, "span", lambda block, device: 1024)
    on_device = Statistics(hessian=hessian.float().to(device))
    with replaying():
        for _ in range(3 if device == "cuda" else 1):
            got = method.quantize_stacked([weight.float().to(device)] * 2, on_device, [scheme] * 2)
            for rounded in got:
                assert int((codes(rounded).cpu() != want).any(1).sum()) <= 12


def codes(rounded: Rounded) -> Tensor:
    assert isinstance(rounded.tensor, AffineTensor)
    return rounded.tensor.codes


def test_ranges_that_look_ahead_are_not_pulled() -> None:
    def ranges(start: int, end: int, weights: Tensor) -> tuple[Affine, list[int]]:
        raise AssertionError("refused before")

    with pytest.raises(ValueError, match="look ahead are solved with span=None"):
        solve_affine(torch.ones(4, 2), torch.eye(4), 2, ranges, span=2)
