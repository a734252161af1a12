"""Loops over a site's blocks that are replayed: the bits of those that are queued block by block. On a CPU a loop stands for its graph, on
the memory that the graph would have."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import replay
from quant.affine import Affine
from quant.kernels import kernel
from quant.kernels.gptq_block import Fits, SolvedBlock
from quant.methods import gptq_ranges
from quant.methods.gptq import Gptq
from quant.replay import Replays, replaying
from quant.scheme import Granularity, WeightScheme
from quant.solver import diagonal_blocks
from quant.statistics import Statistics

METHOD = Gptq(static_groups=True, block_size=32)
G16 = WeightScheme(4, granularity=Granularity.GROUP, group_size=16)
SCHEMES = {"one": [G16] * 2, "bits": [G16, WeightScheme(2)]}


def given(seed: int, k: int = 80, rows: tuple[int, ...] = (32, 16), device: str = "cpu") -> tuple[list[Tensor], Statistics]:
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(2 * k, k, generator=g, device=device)
    return [torch.randn(n, k, generator=g, device=device).bfloat16() for n in rows], Statistics(hessian=x.T @ x)


def packed(weights: list[Tensor], statistics: Statistics, schemes: list[WeightScheme]) -> list[dict[str, Tensor]]:
    return [dict(r.tensor.pack()) for r in METHOD.quantize_stacked(weights, statistics, schemes)]


def packed_alone() -> list[dict[str, Tensor]]:
    """With columns that are kept, which go by the values of the others."""
    [w, _], statistics = given(0)
    return [dict(Gptq(block_size=32, outlier_columns=16).quantize(w.float(), statistics, WeightScheme(4)).tensor.pack())]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in b)


class Captures:
    """Stands for a GPU's."""

    def __init__(self) -> None:
        self.made, self.replayed = 0, 0

    def __call__(self, work: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
        self.made += 1

        def again() -> None:
            self.replayed += 1
            work()

        return again


def enough(device: torch.device, needed: int) -> None:
    return None


@pytest.fixture(autouse=True)
def _weights_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_ranges, "on_gpu", lambda t: True)


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
def test_bits_are_those_of_blocks_one_by_one(schemes: list[WeightScheme]) -> None:
    """The first time queued, the second captured; inputs that differ do not meet."""
    inputs = [given(seed) for seed in range(4)]
    want = [packed(*i, schemes) for i in inputs]
    captures = Captures()
    with replaying(Replays(captures, enough)):
        got = [packed(*i, schemes) for i in inputs]
    assert all(same(*pair) for pair in zip(got, want, strict=True))
    assert (captures.made, captures.replayed) == (1, 3)


def values_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a loop of torch that lets them be left out, how many each call is to give."""
    run, asked = kernel("gptq_block", block=torch.zeros(1, 1)).run, list[int]()
    solve_block = run.solve_block

    def solve(block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock, fits: Fits | None = None) -> SolvedBlock:
        asked.append(out.values.numel())
        solve_block(block, upper, affine, group, out if out.values.numel() else replace(out, values=torch.empty_like(block)), fits)
        return out

    monkeypatch.setattr(run, "SKIPS_VALUES", True, raising=False)
    monkeypatch.setattr(run, "solve_block", solve)
    return asked


def test_values_are_left_out_where_a_kernel_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loop spends its weights, queued or replayed; others get all of them."""
    want, alone = packed(*given(0), SCHEMES["one"]), packed_alone()
    asked = values_asked_for(monkeypatch)
    with replaying(Replays(Captures(), enough)):
        for _ in range(3):
            assert same(packed(*given(0), SCHEMES["one"]), want)
    assert set(asked) == {0}
    asked.clear()
    assert same(packed_alone(), alone)
    assert 0 not in asked


def test_shapes_in_turn_share_memory() -> None:
    """Sites of a block: the memory is that of the largest one seen, and grows where a larger one comes, whose graphs are made anew."""
    small, large = given(0), given(1, k=160)
    want = [packed(*small, SCHEMES["one"]), packed(*large, SCHEMES["one"])]
    captures, replays = Captures(), Replays(Captures(), enough)
    replays._capture = captures
    with replaying(replays):
        for _ in range(4):
            assert same(packed(*small, SCHEMES["one"]), want[0])
        assert (captures.made, captures.replayed) == (1, 3)
        [place] = replays._places.values()
        before = place.memory.numel()
        for _ in range(3):
            assert same(packed(*large, SCHEMES["one"]), want[1])
            assert same(packed(*small, SCHEMES["one"]), want[0])
        assert place.memory.numel() == place.most > before
        assert captures.made == 3
    assert not replays._places, "given back"


def test_settings_are_graphs_of_their_own() -> None:
    captures = Captures()
    with replaying(Replays(captures, enough)):
        for bits, rows in ((4, (32, 16)), (3, (32, 16)), (4, (16, 32))):
            schemes = [WeightScheme(bits, granularity=Granularity.GROUP, group_size=16)] * 2
            want = packed(*given(0, rows=rows), schemes)
            assert same(packed(*given(0, rows=rows), schemes), want)
    assert captures.made == 3


def test_threads_have_memory_of_their_own() -> None:
    inputs = [given(seed) for seed in range(8)]
    want = [packed(*i, SCHEMES["one"]) for i in inputs]
    replays = Replays(Captures(), enough)
    with replaying(replays), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(copy_context().run, partial(packed, *i, SCHEMES["one"])) for i in inputs]
        assert all(same(f.result(), w) for f, w in zip(waiting, want, strict=True))


def test_what_is_not_captured_is_told() -> None:
    def fails(work: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
        raise RuntimeError("no graph\nmore")

    want = packed(*given(0), SCHEMES["one"])
    for replays, said in (
        (Replays(fails, enough), "the solver's blocks were queued one by one: capturing them raised 'no graph'"),
        (Replays(Captures(), lambda device, needed: f"short of {needed}"), "short of"),
    ):
        with replaying(replays):
            notes = [METHOD.quantize_stacked(*given(0), SCHEMES["one"])[0].notes for _ in range(3)]
            assert same(packed(*given(0), SCHEMES["one"]), want)
        assert not any(said in n for n in notes[0])
        for later in notes[1:]:
            assert [n for n in later if said in n]


@pytest.mark.parametrize(("needed", "enough"), [(0, True), (175, True), (176, False), (300, False)])
def test_an_eighth_of_a_devices_memory_stays_free(needed: int, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 bytes 300 are free, and 125 are to stay so."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    said = replay.short_of(torch.device("cuda"), needed)
    assert (said is None) is enough
    assert said is None or f"takes {needed} bytes" in said


def test_memory_that_is_given_back() -> None:
    """Where a device has run out of it: no more graphs for as long as the context lasts, and those who would have one say why."""
    want = packed(*given(0), SCHEMES["one"])
    captures = Captures()
    with replaying(Replays(captures, enough)) as replays:
        for _ in range(2):
            packed(*given(0), SCHEMES["one"])
        replay.give_back("memory had run out")
        assert not replays._places
        for _ in range(2):
            [first, _] = METHOD.quantize_stacked(*given(0), SCHEMES["one"])
        assert first.notes == ["memory had run out"]
        assert same(packed(*given(0), SCHEMES["one"]), want)
    assert captures.made == 1
    replay.give_back("nobody has any")


def test_ranges_that_go_by_the_weights_are_not_replayed() -> None:
    captures = Captures()
    with replaying(Replays(captures, enough)):
        for _ in range(3):
            Gptq(block_size=32).quantize_stacked(*given(0), SCHEMES["one"])
            Gptq(static_groups=True, act_order=True, block_size=32).quantize_stacked(*given(0), SCHEMES["one"])
    assert captures.made == 0


@pytest.mark.parametrize("k", [64, 80, 16])
def test_blocks_of_the_diagonal(k: int) -> None:
    by_columns = torch.randn(k, k).T
    blocks = diagonal_blocks(by_columns, 32)
    want = [by_columns[at : at + 32, at : at + 32] for at in range(0, k, 32)]
    assert all(b.stride(1) == 1 and torch.equal(b, w) for b, w in zip(blocks, want, strict=True))


@pytest.mark.gpu("triton")
def test_graphs_on_a_gpu() -> None:
    """Several reaches of columns; on streams of their own, side by side, and on the default one."""
    inputs = [given(seed, k=1200, rows=(512, 256), device="cuda") for seed in range(6)]
    method = Gptq(static_groups=True)
    scheme = WeightScheme(4, granularity=Granularity.GROUP, group_size=16)

    def run(seed: int) -> list[dict[str, Tensor]]:
        return [dict(r.tensor.pack()) for r in method.quantize_stacked(*inputs[seed], [scheme] * 2)]

    def on_a_stream(seed: int) -> list[dict[str, Tensor]]:
        with torch.cuda.stream(own[seed % 2]):
            found = [run(seed) for _ in range(3)][-1]
            torch.cuda.current_stream().synchronize()
            return found

    want = [run(seed) for seed in range(6)]
    own = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    replays = Replays()
    with replaying(replays):
        got = [run(seed) for seed in range(6)]
        assert all(same(*pair) for pair in zip(got, want, strict=True))
        [place] = replays._places.values()
        assert all(place.graphs.values()), replays._refused
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(copy_context().run, partial(on_a_stream, seed)) for seed in range(6)]
            assert all(same(f.result(), w) for f, w in zip(waiting, want, strict=True))
        assert replays._refused is None
    assert replay.current() is None
