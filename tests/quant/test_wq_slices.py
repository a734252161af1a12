"""16 rows of x by blocks that have a slice of K each: on the host, lane by lane, and on a GPU, where there is one. They are right where
test_wq_fragments.py says so of other blocks: the bits are the same."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from quant.kernels import kernel, native
from quant.kernels.counters import COUNTERS, Counters, counters
from quant.kernels.products import rows_alone
from quant.kernels.wq_gemv import Packed
from quant.kernels.wq_gemv import cuda as twin
from quant.kernels.wq_gemv.fragments import Fragments, prepare
from tests.quant.cuda_on_host import spills_nothing
from tests.quant.products_affine import inputs, stored
from tests.quant.test_wq_fragments import checked, host_is_built, large, on_host

needs_device = pytest.mark.gpu("nvcc")
SHORT = 144 * 1024
"""Bytes with which rings of two tiles are as short as can be, where x is short."""
H200 = (132, 227 * 1024)


def by_slices(x: Tensor, packed: Packed, at_once: int, blocks: int, room: int = 227 * 1024) -> Tensor:
    host_is_built()
    n, k = packed.shape
    tiles = -(-n // 16)
    out = torch.full((len(x), n), torch.nan, dtype=x.dtype)
    sums, arrived = torch.full((tiles, 8, 256), torch.nan), torch.zeros(tiles, dtype=torch.int32)
    numbers = (n, k, packed.groups, packed.bits, len(x), int(packed.ranges.dtype is torch.float16), at_once, blocks, room)
    native.call("wq_fragments", "bitgrid_wq_slices", packed.words, packed.ranges, x, out, sums, arrived, *numbers)
    assert not arrived.any()
    return out


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(16, 128, 128), (40, 1152, 384), (61, 352, 352), (17, 8 * 128 * 7 + 256, 128), (150, 1056, 1056)]
)
def test_bits_are_those_of_other_blocks(n: int, k: int, group: int, at_once: int) -> None:
    """Slices without a step or shorter than a ring; blocks without a tile, and with more than their warps have at once."""
    for dtype in (torch.float16, torch.float32):
        tensor, x = stored(n, k, 4, group, dtype=dtype), inputs(16, k).bfloat16()
        packed = prepare(tensor)
        want = on_host(x, packed)
        checked(want, x, tensor)
        for blocks in (1, 3):
            assert torch.equal(by_slices(x, packed, at_once, blocks), want)
            assert torch.equal(by_slices(x, packed, at_once, blocks, SHORT), want)
        for m in (9, 13):
            assert torch.equal(by_slices(x[:m].contiguous(), packed, at_once, 1), want[:m])


def test_more_tiles_than_all_warps_of_a_block_have_at_once() -> None:
    tensor, x = stored(16 * 33, 1152, 4, 128), inputs(11, 1152).bfloat16()
    packed = prepare(tensor)
    want = on_host(x, packed)
    for at_once in (1, 2):
        assert torch.equal(by_slices(x, packed, at_once, 1), want)


def test_codes_of_zero_leave_nothing() -> None:
    tensor = stored(40, 1088, 4, 1088)
    packed = prepare(replace(tensor, codes=torch.zeros_like(tensor.codes), zero=torch.zeros_like(tensor.zero)))
    assert not by_slices(inputs(16, 1088).bfloat16(), packed, 2, 1).any()


def shaped(n: int, k: int, bits: int = 4, group: int = 128, ranges: torch.dtype = torch.float16, scaled: bool = False) -> Fragments:
    scale = torch.ones(k) if scaled else None
    return Fragments(torch.empty(0, dtype=torch.int32), torch.empty(0, k // group, dtype=ranges), scale, (n, k), bits)


def test_which_products_are_by_slices() -> None:
    """Tiles at once and blocks, on an H200: where most of the warps have tiles, x fits beside the rings, and nothing else is faster."""
    half = torch.bfloat16
    for n, k, at_once in (
        (4096, 4096, 0), (4096, 11008, 1), (8192, 8192, 0), (8192, 28672, 2), (11008, 4096, 1), (28672, 8192, 1), (14336, 4096, 0),
        (1024, 4096, 0), (5120, 5120, 0), (8192, 8 * 128 * 29, 2), (8192, 8 * 128 * 31, 0),
    ):  # fmt: skip
        assert twin.by_slices(shaped(n, k), half, H200) == ((at_once, 16) if at_once else (0, 0))
    few = (0, 0)
    assert twin.by_slices(shaped(8192, 28672), torch.float32, H200) == few
    assert twin.by_slices(shaped(8192, 28672, bits=3), half, H200) == few
    assert twin.by_slices(shaped(8192, 28672, group=64), half, H200) == few
    assert twin.by_slices(shaped(8192, 28672, scaled=True), half, H200) == few
    assert twin.by_slices(shaped(8192, 9696, group=9696), half, H200) == (2, 16)
    # An A100, whose blocks may ask for less, and one with few multiprocessors.
    assert twin.by_slices(shaped(6144, 12288), half, (108, 163 * 1024)) == (2, 13)
    assert twin.by_slices(shaped(8192, 28672), half, (128, 163 * 1024)) == few
    assert twin.by_slices(shaped(2048, 8448), half, (4, 227 * 1024)) == (2, 1)


@pytest.mark.parametrize(("ranges", "size"), [(torch.float16, 4), (torch.float32, 8)])
def test_what_is_said_to_fit_does(ranges: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, which refuses what does not, is of one mind with `by_slices`."""
    host_is_built()
    monkeypatch.setattr(twin, "SMALL", 0)
    monkeypatch.setattr(twin, "FEW_STEPS", 0)
    for n, at_once in ((256, 1), (512, 2)):
        packed = prepare(stored(n, 1152, 4, 128, dtype=ranges))
        x = inputs(9, 1152).bfloat16()
        least = 2 * (2 * 16 * 128 + 128) + twin.LEAST_STAGES[at_once] * 16 * at_once * 16 * (64 + size)
        assert twin.by_slices(packed, x.dtype, (8, least)) == (at_once, 1)
        assert twin.by_slices(packed, x.dtype, (8, least - 1)) == (0, 0)
        assert torch.isfinite(by_slices(x, packed, at_once, 1, room=least).float()).all()
        assert torch.isnan(by_slices(x, packed, at_once, 1, room=least - 1)).all()


def test_rows_up_to_which_wq_gemm_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "_device", lambda device: H200)
    half = torch.bfloat16
    assert rows_alone(twin, shaped(8192, 28672), half) == 16
    assert rows_alone(twin, shaped(8192, 28672), torch.float32) == rows_alone(twin, shaped(8192, 28672, scaled=True), half) == 8
    # By other blocks, only where the weight is small, and never more than they take.
    assert rows_alone(twin, shaped(4096, 4096, bits=3), half) == 16
    assert rows_alone(twin, shaped(4096, 4096), torch.float32) == rows_alone(twin, shaped(4096, 4096, scaled=True), half) == 8
    assert rows_alone(twin, shaped(8192, 8192, bits=3), half) == rows_alone(twin, shaped(8192, 4096, bits=3), half) == 8
    assert rows_alone(kernel("wq_gemv", "reference").run, shaped(8192, 4096), half) == 8


def test_calls_at_the_same_time_count_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.kernels.counters._made", {})
    own = Counters(torch.device("cpu"))
    parts = [own.take(count) for count in (5, 1, 512)]
    places = [(p.data_ptr(), p.data_ptr() + 4 * len(p)) for p in parts]
    assert all(a[1] <= b[0] and b[0] % 16 == 0 for a, b in pairwise(places))
    assert own.take(COUNTERS - 256).data_ptr() == places[0][0]
    made: list[Counters] = []
    threads = [Thread(target=lambda: made.append(counters(torch.device("cpu")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(map(id, made))) == 1


@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling takes 2 s")
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_what_the_compiler_makes_of_it(architecture: str, tmp_path: Path) -> None:
    spills_nothing("wq_slices", architecture, tmp_path, 3)


@needs_device
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (8192, 1024), (8192, 28672), (14336, 4096), (4090, 11008)])
def test_bits_are_those_of_fewer_rows_on_a_device(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "SMALL", 0)
    monkeypatch.setattr(twin, "FEW_STEPS", 0)
    tensor = large(n, k, 4, 128)
    packed = twin.prepare(tensor)
    assert twin.by_slices(packed, torch.bfloat16) != (0, 0)
    for m in (9, 16):
        x = torch.randn(m, k, device="cuda").bfloat16()
        want = torch.cat([twin.wq_gemv(part, packed) for part in (x[:8], x[8:])])
        for _ in range(10):
            assert torch.equal(twin.wq_gemv(x, packed), want)


@needs_device
def test_counters_are_left_as_zeros() -> None:
    packed = twin.prepare(large(4096, 11008, 4, 128))
    assert twin.by_slices(packed, torch.bfloat16) != (0, 0)
    for _ in range(3):
        twin.wq_gemv(torch.randn(16, 11008, device="cuda").bfloat16(), packed)
    assert not counters(packed.words.device)._all.any()
