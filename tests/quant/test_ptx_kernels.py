"""Kernels of `quant/csrc/*.cu` as nvcc compiles them, run on the host (`tests/quant/ptx`) where there is no GPU: launched by their own host
code, with the forms and grids that it chooses on devices with many and with few multiprocessors, against what tests on a GPU hold them to.
On the way no access may be beside a tensor or shared memory, at an odd address, or in a race of threads or blocks.

What a GPU does that this does not show: what ptxas makes of PTX, time, the order of its sums in tensor cores and approximate reciprocals
(their last bits), and races of a block's threads in global memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.binary_gemv import cuda as binary_cuda
from quant.kernels.braq_block import cuda as braq_block
from quant.kernels.braq_block import eager
from quant.kernels.braq_search import cuda as braq_search
from quant.kernels.claq_block import cuda as claq_cuda
from quant.kernels.counters import Counters
from quant.kernels.gptq_block import SolvedBlock
from quant.kernels.gptq_block import cuda as gptq_cuda
from quant.kernels.kmeans_columns import cuda as kmeans_cuda
from quant.kernels.lut_gemv import cuda as lut_cuda
from quant.kernels.row_lut_gemv import cuda as row_cuda
from quant.kernels.wq_gemv import cuda as wq_cuda
from tests.quant import test_braq_block, test_braq_cuda, test_claq_stacked, test_gptq_lanes, test_kmeans_cuda, test_table_gemv_cuda
from tests.quant import test_wq_fragments as of_wq
from tests.quant.products_affine import inputs, stored
from tests.quant.products_tables import cases, codebook, signs
from tests.quant.ptx.launches import Program, Programs, on_the_machine

COMPILES = os.environ.get("BITGRID_COMPILE") == "1"
LONG = pytest.mark.skipif(not COMPILES, reason="BITGRID_COMPILE is not 1: compiling takes minutes")
ORDERS = (("90a", 0), ("90a", 1), *([("80", 1)] if COMPILES else []))
"""Target, and a number of the order in which warps and blocks go on; 0: one after another."""
pytestmark = [pytest.mark.xdist_group("ptx"), pytest.mark.timeout(1200)]
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
LITTLE = 99 * 1024
"""Bytes of shared memory that a block may have on devices of compute capability 8.6."""


@cache
def programs(target: str) -> Programs:
    return Programs(target)


@pytest.fixture(params=ORDERS, ids=lambda p: f"{p[0]}-{p[1]}")
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    target, seed = request.param
    made = programs(target)
    made.order(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    on_the_machine(made, monkeypatch)
    yield made
    torch.set_num_threads(threads)


TABLES: dict[str, tuple[Callable[[Tensor, Any], Tensor], list[Any]]] = {
    "row_lut_gemv": (row_cuda.row_lut_gemv, []),
    "lut_gemv": (lut_cuda.lut_gemv, [codebook(70, 1500, (4,), 2), codebook(700, 40, (4,)), codebook(37, 1500, (2, 3))]),
    "binary_gemv": (binary_cuda.binary_gemv, [signs(21, 900, 256, True, FLOAT32, True), signs(600, 200, 128), signs(40, 1500, 128)]),
}


@pytest.mark.parametrize("operation", ["row_lut_gemv", *(pytest.param(op, marks=LONG) for op in ("lut_gemv", "binary_gemv"))])
def test_products_with_tables(machine: Programs, operation: str) -> None:
    run, more = TABLES[operation]
    for tensor in [*cases(operation), *more]:
        packed, k = test_table_gemv_cuda.PREPARE[operation](tensor), tensor.shape[1]
        # One cluster at once has many tiles; little memory has no room for rings, or for all columns' bits.
        little = (LITTLE, LITTLE // 2) if operation == "binary_gemv" else (LITTLE,)
        for shared in (None, *(little if k == 1500 else ())):
            machine[operation].on(clusters=1 if tensor.shape[0] > 64 else 15, shared=shared)
            for m, dtype in product((1, 2, 3, 5), (BFLOAT16, FLOAT32)):
                x = inputs(m, k, dtype)
                test_table_gemv_cuda.check(run(x, packed), x, tensor)


@LONG
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_of_tables(machine: Programs, bits: int) -> None:
    """As the layout's own reading gives them; a value of a codebook of columns is rounded to 2^(bits - 24) of the largest of its column."""
    tensor = codebook(70, 300, (bits,))
    for dtype in (FLOAT32, BFLOAT16):
        want, step = tensor.dequantize().float(), 2.0**-8 if dtype is BFLOAT16 else 0.0
        largest = tensor.tables.float().abs().amax(1)
        off = (lut_cuda.values(lut_cuda.prepare(tensor), dtype).float() - want).abs()
        assert bool((off <= 2.0 ** (bits - 24) * largest + step * want.abs()).all())
        rows = test_table_gemv_cuda.row_codebook(33, 97, bits)
        assert torch.equal(row_cuda.values(row_cuda.prepare(rows), dtype), rows.dequantize().to(dtype))
    tensor = signs(21, 900, 256)
    for dtype, step in ((FLOAT32, 0.0), (BFLOAT16, 2.0**-8)):
        got, want = binary_cuda.values(binary_cuda.prepare(tensor), dtype).float(), tensor.dequantize().float()
        assert bool(((got - want).abs() <= 2.0**-22 * want.abs().amax(1, keepdim=True) + step * want.abs()).all())


@LONG
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("multiprocessors", [132, 3, 1])
def test_products_with_affine_codes(machine: Programs, bits: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few multiprocessors take several tiles at once, and rows of x in several turns."""
    early, shared = int(machine.target == "90a"), 227 * 1024 if machine.target == "90a" else 163 * 1024
    monkeypatch.setattr(wq_cuda, "_early", lambda device: early)
    monkeypatch.setattr(wq_cuda, "_device", lambda device: (multiprocessors, shared))
    machine["wq_gemv"].on(multiprocessors)
    for n, k, group in [*of_wq.CASES, *((n, 384, group) for n in (40, 80, 120) for group in (32, 64, 128))]:
        for dtype in (torch.float16, FLOAT32):
            tensor = stored(n, k, bits, group, dtype=dtype)
            packed = of_wq.prepare(tensor)
            for x in (inputs(1, k, BFLOAT16), inputs(3, k, BFLOAT16), inputs(1, k), inputs(11, k, BFLOAT16), inputs(5, k), inputs(9, k)):
                of_wq.checked(wq_cuda.wq_gemv(x, packed), x, tensor)
            for kind in (BFLOAT16, FLOAT32, torch.float16) if n == 40 else (BFLOAT16,):
                of_wq.check_weight(wq_cuda.values(packed, kind), packed)


# Multiprocessors, N, K, group: forms for one row that K and the number of tiles choose between, with x in little and in all memory.
ALONE = (
    (4, 64, 8192, 128),
    (2, 64, 16384, 128),
    (4, 64, 18432, 18432),
    (2, 32, 22016, 128),
    (2, 64, 28672, 128),
    (1, 96, 1024, 128),
    (1, 33, 4096, 4096),
)
ALONE += ((3, 48, 11008, 128), (1, 160, 640, 128))


@LONG
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_row_of_affine_codes(machine: Programs, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wq_cuda, "_early", lambda device: int(machine.target == "90a"))
    for (multiprocessors, n, k, group), dtype in product(ALONE, (torch.float16, FLOAT32)):
        machine["wq_gemv"].on(multiprocessors)
        tensor, x = stored(n, k, bits, group, dtype=dtype), inputs(1, k, BFLOAT16)
        of_wq.checked(wq_cuda.wq_gemv(x, of_wq.prepare(tensor)), x, tensor)


@pytest.mark.parametrize("blocks", [1, 2])
def test_products_by_slices(machine: Programs, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last to arrive adds up, and leaves counters as zeros."""
    counted = Counters(torch.device("cpu"))
    monkeypatch.setattr(wq_cuda, "counters", lambda device: counted)
    monkeypatch.setattr(wq_cuda, "_early", lambda device: int(machine.target == "90a"))
    machine["wq_slices"].on(8 * blocks, shared=None if blocks == 1 else 144 * 1024)  # for short rings, where K is long
    for at_once, (n, k, group) in product((1, 2), ((17, 1152, 128), (61, 352, 352), (40, 2304, 384), (300, 128, 128), (40, 8192, 128))):
        monkeypatch.setattr(wq_cuda, "by_slices", lambda packed, dtype, at_once=at_once: (at_once, blocks))
        for dtype in (torch.float16, FLOAT32):
            tensor = stored(n, k, 4, group, dtype=dtype)
            for m in (9, 16):
                x = inputs(m, k, BFLOAT16)
                of_wq.checked(wq_cuda.wq_gemv(x, of_wq.prepare(tensor)), x, tensor)
            assert not counted._all.any()


def solved(block: Tensor, upper: Tensor, affine: Any, group: list[int], lanes: int, values: bool = True) -> SolvedBlock:
    out = test_gptq_lanes.with_loss(block, values)
    return gptq_cuda.solve_block(block, upper, affine, group, out, lanes=lanes)


@cache
def loading_what_it_uses(target: str) -> Program:
    return Program(native.SOURCES / "gptq_block.cu", target, more=("-DBITGRID_LOADS_USED",))


@pytest.fixture
def gptq(machine: Programs, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """With `ahead`, gptq_block as a GPU has it: it loads errors ahead that it does not use (`Updates::take`), in races that are none but
    in form. Else without these loads, so that any race is one."""
    ahead = request.param == "ahead"
    if not ahead:
        monkeypatch.setitem(machine, "gptq_block", loading_what_it_uses(machine.target))
        machine.order(machine.seed)
    machine["gptq_block"].strict = not ahead
    return machine


IN_BOTH = pytest.mark.parametrize("gptq", ["ahead", "used"], indirect=True)


@pytest.mark.parametrize(("gptq", "grid"), [("ahead", "g_asym"), *(("used", g) for g in sorted(test_gptq_lanes.GRIDS))], indirect=["gptq"])
def test_blocks_of_gptq(gptq: Programs, grid: str) -> None:
    gptq["gptq_block"].on(1 if grid == "g_asym" else 132)  # more blocks than multiprocessors have fewer helpers
    for lanes, (rows, columns, bits) in product((0, 1, 4), [*test_gptq_lanes.SHAPES, (150, 128, 4)]):
        given = test_gptq_lanes.problem(rows, columns, grid, bits, FLOAT32)
        test_gptq_lanes.agrees(solved(*given, lanes), *given)


@IN_BOTH
@pytest.mark.usefixtures("gptq")
def test_blocks_of_gptq_with_two_rows_a_lane() -> None:
    for rows, columns, bits in ((64, 128, 4), (128, 96, 3), (192, 16, 2), (448, 112, 5)):
        given = test_gptq_lanes.problem(rows, columns, "g_asym", bits, FLOAT32)
        test_gptq_lanes.agrees(solved(*given, -2), *given)


@IN_BOTH
def test_teams_of_blocks_of_gptq(gptq: Programs) -> None:
    """Two, three and four, as few as put all blocks on a multiprocessor each: here there is one."""
    gptq["gptq_block"].on(1)
    for teams, rows in ((2, 64), (3, 96), (4, 128)):
        given = test_gptq_lanes.problem(rows, 128, "g_asym", 4, FLOAT32)
        test_gptq_lanes.agrees(solved(*given, 1), *given)
        assert gptq["gptq_block"].threads == 32 * teams * (1 + 3)
        each = rows // 4 - 2  # of the first of four parts; of each other one more
        test_gptq_lanes.ranges_are_found(lambda *given: gptq_cuda.solve_block(*given, 1), test_gptq_lanes.FOUND[0][:3], 128, 32, each)


@pytest.mark.parametrize(("gptq", "lanes"), [("used", 1), ("used", 4)], indirect=["gptq"])
@pytest.mark.usefixtures("gptq")
def test_blocks_of_gptq_of_any_number_of_columns(lanes: int) -> None:
    test_gptq_lanes.any_number_of_columns(solved, lanes)


@pytest.mark.parametrize("gptq", ["used"], indirect=True)
def test_blocks_of_gptq_without_values(gptq: Programs) -> None:
    for processors in (1, 132):
        gptq["gptq_block"].on(processors)
        test_gptq_lanes.values_may_be_left_out(solved)


@pytest.mark.parametrize(("gptq", "lanes"), [("ahead", 1), ("used", 1), ("used", 4)], indirect=["gptq"])
@pytest.mark.usefixtures("gptq")
def test_ranges_are_found_in_the_launch_of_a_block(lanes: int) -> None:
    for grids in test_gptq_lanes.FOUND:
        test_gptq_lanes.ranges_are_found(lambda *given: gptq_cuda.solve_block(*given, lanes), grids)
    test_gptq_lanes.ranges_are_found(lambda *given: gptq_cuda.solve_block(*given, lanes), test_gptq_lanes.FOUND[0][:3], 128, 32)


@pytest.mark.parametrize("kind", ["normal", "dead", "tied"])
def test_blocks_of_signs(machine: Programs, kind: str) -> None:
    for n, k, wanted in test_braq_block.CASES:
        w, upper = test_braq_block.weights(n, k, kind)
        got, want = (test_braq_block.made(run, w, upper, wanted) for run in (braq_block, eager))
        test_braq_block.agree(w, upper, wanted, got, want)


def test_searches_of_signs(machine: Programs) -> None:
    for (n, c), tied in product(test_braq_cuda.SHAPES, (False, True)):
        test_braq_cuda.same(braq_search, "cpu", n, c, tied)


@LONG
@pytest.mark.parametrize("start", test_kmeans_cuda.STARTS)
@pytest.mark.parametrize("shape", test_kmeans_cuda.SHAPES)
def test_centres_of_columns(machine: Programs, shape: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, columns = test_kmeans_cuda, test_kmeans_cuda.columns
    for n, k in ((1, 1), (31, 3), (33, 16), (513, 16), (700, 64)):
        of.same(kmeans_cuda, columns(shape, n, seed=n, count=2), k, start)
    for n, k in ((33, 16), (513, 16)):
        if shape in ("heavy", "two", "rounded"):
            of.same(kmeans_cuda, columns(shape, n, seed=n, count=2), k, start, of.heaviness(n, 2))
    monkeypatch.setattr(kmeans_cuda, "TOGETHER", 2)
    for weights in (None, of.heaviness(333, 3)):
        of.same(kmeans_cuda, columns(shape, 333, count=3, dtype=torch.float64), 6, start, weights)
    if shape == "normal" and machine.target == "90a":
        for n, k in ((5000, 4), (11008, 4), (kmeans_cuda.MOST_ROWS + 1, 2)):
            of.same(kmeans_cuda, columns(shape, n, count=1), k, start)
        for n in (5000, kmeans_cuda.MOST_WEIGHED + 1):
            of.same(kmeans_cuda, columns(shape, n, count=1), 2, start, of.heaviness(n, 1)[0])


TALL: dict[str, Any] = {
    "tall": ([9000], [[1, 1]], None, "partition", False),
    "tall given": ([4700, 9000], [[2, 1], [1, 2]], 0.014, "partition", True),
}


@LONG
@pytest.mark.parametrize("case", [*test_claq_stacked.CASES, *TALL])
def test_blocks_of_tables(machine: Programs, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = test_claq_stacked.parts_of(*(test_claq_stacked.CASES | TALL)[case])
    made: list[Tensor] = []
    on_the_machine(machine, monkeypatch, made)
    # A table on the host has the addresses of what it is made of.
    monkeypatch.setattr(Tensor, "data_ptr", lambda t, own=Tensor.data_ptr: (made.append(t), own(t))[1])
    test_claq_stacked.alone_and_together(claq_cuda, parts, test_claq_stacked.factor(len(parts[0].block)))
