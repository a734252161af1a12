"""The GPU's column loop: the same source on the host, lane by lane; what nvcc makes of it; and on a GPU where there is one.

Errors of earlier panels come off by sums of tensor cores, of numbers split in two. So every column is what the errors before it leave of
it, within some roundings of float32; rows that are solved again are the plain loop's, bit for bit. However many lanes share a row, and
whatever stands beside it, its results are the same, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.grids import GRIDS, fit
from quant.kernels import kernel, native, on_cuda, recorded
from quant.kernels.gptq_block import Fit, Fits, SolvedBlock, cuda, triton
from tests.quant.plain_loop import alike, follows, off_by, plain_loop, poisoned
from tests.quant.test_gptq_block import FOUND, STACKS, problem, ranges_are_found, rows_need_no_others, with_odd_numbers

GPU = pytest.mark.gpu("nvcc")
SHAPES = ((1, 128, 4), (37, 96, 3), (5, 16, 2), (33, 48, 8), (9, 112, 5), (130, 32, 6), (3, 80, 7))
"""Rows, columns, bits. Groups of 16 columns."""
TWO_ROWS = -2
PLAIN = 12
"""Where `cuda.arguments` says that zeros are whole, panels whole and groups as wide as panels."""


@pytest.fixture(autouse=True)
def _compiler(request: pytest.FixtureRequest) -> None:
    """Tests on a GPU do not wait for the host's library."""
    reason = None if request.node.get_closest_marker("gpu") else native.unavailable("gptq_lanes", torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)


def with_loss(block: Tensor, values: bool = True) -> SolvedBlock:
    """Poisoned, but what is added to."""
    made = poisoned(block)
    return replace(made, values=made.values if values else made.values[:0], loss=torch.full_like(block[0], 0.5))


def emulated(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], lanes: int, plain: bool | None = None, values: bool = True
) -> SolvedBlock:
    out = with_loss(block, values)
    arguments, kept = cuda.arguments(block, upper, affine, group, out)
    if plain is not None:
        arguments[PLAIN] = int(plain)
    native.call("gptq_lanes", "bitgrid_gptq_lanes", *arguments, lanes)
    del kept
    return out


def on_gpu(block: Tensor, upper: Tensor, affine: Affine, group: list[int], lanes: int, values: bool = True) -> SolvedBlock:
    block, upper, scale, zero = (t.cuda() for t in (block, upper, affine.scale, affine.zero))
    out, tops = with_loss(block, values), None if affine.tops is None else affine.tops.cuda()
    cuda.solve_block(block, upper, Affine(scale, zero, affine.bits, affine.kind, tops), group, out, lanes=lanes)
    assert out.loss is not None
    return SolvedBlock(out.codes.cpu(), out.values.cpu(), out.errors.cpu(), out.loss.cpu())


RUNS = [pytest.param(emulated, id="host"), pytest.param(on_gpu, id="gpu", marks=GPU)]


# The warp that solves subtracts at most 23 products from a number. Tensor cores add up at most 13 units, eight products and the sum so far
# at a time: on an H100 (Khattak and Mikaitis 2025) all but the largest are cut off two bits below its last one, half a rounding each, and
# their sum at its own last one, two. Sums of products with what is left are 2^-10 as large: all that is cut off of them is less than one.
# A product lacks less than 2^-21 of itself: eight. Two more join the sums. A host's sums are rounded, one each.
ROUNDINGS = 23 + 13 * (8 // 2 + 2) + 1 + 8 + 2


def agrees(got: SolvedBlock, block: Tensor, upper: Tensor, affine: Affine, group: list[int], odd: bool = False) -> None:
    """odd: rows may be solved again. Else none is, which would hide what was read before it was written: none is the plain loop's."""
    again = alike(got, plain_loop(block, upper, affine, group))
    assert odd or len(block) <= cuda.PANEL or not bool(again.any())
    assert bool((again | follows(got, block, upper, affine, group, ROUNDINGS)).all())
    sums = got.errors.double().square().sum(0) + 0.5
    assert got.loss is not None
    # A sum of B terms in float32, each rounded once more.
    fine = torch.isfinite(sums) & (sums < 1e30)
    assert torch.allclose(got.loss.double()[fine], sums[fine], rtol=(len(block) + 1) * 2.0**-24, atol=0)


def equal(got: SolvedBlock, want: SolvedBlock, times: int = 1) -> bool:
    """want: of rows that come again. Bit for bit."""
    pairs = zip((got.codes, got.values, got.errors), (want.codes, want.values, want.errors), strict=True)
    return all(torch.equal(mine.cpu(), one.cpu().repeat(1, times)[:, : mine.shape[1]]) for mine, one in pairs)


def values_may_be_left_out(run: Any) -> None:
    """All else is the same, in rows that are solved again too."""
    for rows, columns, grid in ((64, 128, "g_asym"), (192, 48, "g_asym"), (33, 48, "kivi")):
        given = problem(rows, columns, grid, 4, torch.float32)
        given[0][3, 5] = torch.nan
        for lanes in (1, 4, TWO_ROWS) if grid == "g_asym" else (1, 4):
            want, got = run(*given, lanes), run(*given, lanes, values=False)
            for name in ("codes", "errors", "loss"):
                assert torch.equal(getattr(got, name).nan_to_num(9.0), getattr(want, name).nan_to_num(9.0)), (name, lanes)


@pytest.mark.parametrize("run", RUNS)
def test_values_that_nobody_wants_are_not_written(run: Any) -> None:
    values_may_be_left_out(run)


def test_sums_that_are_not_exact_enough_are_seen() -> None:
    """Factors of 11 bits, as tensor cores take them: without what is left of them, three rows of four are refused or more."""
    w, upper, affine, group = problem(40, 128, "g_asym", 4, torch.float32)
    rounded = (upper * (1 + 2.0**-11)).view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32)
    assert bool(follows(plain_loop(w, upper, affine, group), w, upper, affine, group, ROUNDINGS).all())
    coarse = plain_loop(w, rounded.triu(1) + upper.diagonal().diag(), affine, group)
    assert float(follows(coarse, w, upper, affine, group, ROUNDINGS).double().mean()) < 0.25


@pytest.mark.parametrize("run", RUNS)
def test_fewer_roundings_than_the_plain_loop(run: Any) -> None:
    given = w, upper, _, _ = problem(128, 128, "g_asym", 4, torch.float32)
    assert off_by(run(*given, 1), w, upper) < off_by(plain_loop(*given), w, upper)


@pytest.mark.parametrize("run", RUNS)
def test_lanes_of_a_row_change_nothing(run: Any) -> None:
    for rows, columns, bits in ((64, 128, 4), (64, 112, 3), (128, 48, 2)):
        given = problem(rows, columns, "g_asym", bits, torch.float32)
        one = run(*given, 1)
        assert all(equal(run(*given, lanes), one) for lanes in (4, TWO_ROWS))
        if run is emulated:  # the form for all kinds
            assert equal(emulated(*given, 1, plain=False), one)


@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_codes_are_those_of_products_rounded_first(grid: str) -> None:
    """All but one of a thousand at most, as asked for; and not all, else this would not be about the fused operation."""
    apart = total = 0
    for bits in (2, 3, 4, 8):
        given = problem(256, 128, grid, bits, torch.float32)
        want, got = kernel("gptq_block", "reference").run.solve_block(*given), emulated(*given, 1)
        apart, total = apart + int((got.codes != want.codes).sum()), total + got.codes.numel()
        assert not torch.equal(got.errors, want.errors)
    assert apart <= 1e-3 * total


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("lanes", [1, 4])
def test_each_column_is_what_errors_leave_of_it(run: Any, grid: str, lanes: int) -> None:
    for rows, columns, bits in SHAPES:
        given = problem(rows, columns, grid, bits, torch.float32)
        agrees(run(*given, lanes), *given)


@pytest.mark.parametrize("run", RUNS)
def test_two_rows_a_lane(run: Any) -> None:
    """Whole teams of 64 rows, one to three warps that help each on the host; numbers that the fast division cannot take in either row."""
    for rows, columns, bits in ((64, 128, 4), (128, 96, 3), (192, 16, 2), (64, 48, 8), (448, 112, 5), (64, 32, 6)):
        given = problem(rows, columns, "g_asym", bits, torch.float32)
        agrees(run(*given, TWO_ROWS), *given)
    w, upper, affine, group = problem(64, 64, "g_asym", 4, torch.float32)
    for row in (2, 5, 63):
        w[row, row] = 1e-30
        affine.scale[row % 4, row] = 1e-20
    w[7, 40], w[8, 41] = torch.nan, torch.inf
    agrees(run(w, upper, affine, group, TWO_ROWS), w, upper, affine, group, odd=True)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("lanes", [1, 4])
def test_stacked_configurations_are_solved_as_apart(run: Any, lanes: int) -> None:
    for grid, widths in STACKS:
        rows_need_no_others(lambda *given: run(*given, lanes), grid, widths)


def found_by_emulation(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None, fits: Fits | None, lanes: int
) -> SolvedBlock:
    out = SolvedBlock.like(block) if out is None else out
    values, kept = cuda.arguments(block, upper, affine, group, out, fits)
    native.call("gptq_lanes", "bitgrid_gptq_lanes", *values, lanes)
    del kept
    return out


def found_on_gpu(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None, fits: Fits | None, lanes: int
) -> SolvedBlock:
    scale, zero = affine.scale.cuda(), affine.zero.cuda()
    tops = None if affine.tops is None else affine.tops.cuda()
    there = None if fits is None else Fits(fits.parts, fits.words.cuda(), fits.odd.cuda())
    solved = cuda.solve_block(block.cuda(), upper.cuda(), Affine(scale, zero, affine.bits, affine.kind, tops), group, None, there, lanes)
    if fits is not None and there is not None:
        for here, made in ((affine.scale, scale), (affine.zero, zero), (fits.odd, there.odd)):
            here.copy_(made)
    return SolvedBlock(solved.codes.cpu(), solved.values.cpu(), solved.errors.cpu())


@pytest.mark.parametrize("run", [pytest.param(found_by_emulation, id="host"), pytest.param(found_on_gpu, id="gpu", marks=GPU)])
@pytest.mark.parametrize("lanes", [1, 4])
def test_ranges_are_found_in_the_launch(run: Any, lanes: int) -> None:
    for grids in FOUND:
        ranges_are_found(lambda *given: run(*given, lanes), grids)
    # Groups as wide as panels: the form for whole zeros.
    ranges_are_found(lambda *given: run(*given, lanes), FOUND[0][:3], columns=128, smallest=32)


@GPU
def test_ranges_of_two_rows_a_lane_are_found() -> None:
    w, upper, affine, _ = problem(64, 128, "g_asym", 4, torch.float32)
    block, u, group = w.repeat(1, 300).cuda(), upper.cuda(), [j // 32 for j in range(128)]
    fitted = fit(GRIDS["g_asym"], w.T.reshape(64, 4, 32), 4, w.dtype)
    scale, zero = fitted.scale[..., 0].T.contiguous(), fitted.zero[..., 0].T.contiguous()
    want = on_gpu(w, upper, Affine(scale, zero, 4, affine.kind), group, 1)
    for rows in (64, 64 * 200, 64 * 300):  # one team, and more than a wave
        fits = Fits.of([Fit(rows, 32, "g_asym", 4)], block.device)
        here = Affine(torch.full((4, rows), torch.nan, device="cuda"), torch.full((4, rows), torch.nan, device="cuda"), 4, affine.kind)
        got = cuda.solve_block(block[:, :rows].contiguous(), u, here, group, None, fits, TWO_ROWS)
        assert all(torch.equal(x.cpu(), y.repeat(1, rows // 64)) for x, y in ((here.scale, scale), (here.zero, zero)))
        assert equal(got, want, rows // 64)
        assert int(fits.odd) == 0
    odd = Affine(scale[:, :63].cuda(), zero[:, :63].cuda(), 4, affine.kind)
    with pytest.raises(RuntimeError, match="CUDA error"):
        cuda.solve_block(block[:, :63].contiguous(), u, odd, group, lanes=TWO_ROWS)


def any_number_of_columns(run: Any, lanes: int) -> None:
    """Of one group: the form for whole zeros, on views of larger matrices whose rows lie apart, aligned to 16 bytes or not."""
    w, upper, affine, _ = problem(7, 128, "g_asym", 4, torch.float32)
    ranges = torch.full((2, 8, 19), torch.nan)
    ranges[0, :, 3:10], ranges[1, :, 3:10] = affine.scale, affine.zero
    for width, columns in product((132, 133), (1, 2, 16, 31, 32, 33, 48, 64, 65, 97, 112, 127, 128)):
        start = 4 if width == 132 else columns % 5
        wide = torch.full((300, width), torch.nan)
        wide[start : start + columns, start : start + columns] = upper[:columns, :columns]
        view = wide[start : start + columns, start : start + columns]
        scales = Affine(ranges[0, :, 3:10], ranges[1, :, 3:10], 4, affine.kind)
        group = [7 - j // 32 for j in range(columns)]
        given = w[:columns].clone(), view, scales, group  # with nothing after its columns
        values, _kept = cuda.arguments(*given, poisoned(given[0]))
        assert values[PLAIN] == (columns % cuda.PANEL == 0)
        agrees(run(*given, lanes), *given)
        if run is emulated:  # the form for all kinds, too
            agrees(emulated(*given, lanes, plain=False), *given)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("lanes", [1, 4])
def test_any_number_of_columns_of_one_group(run: Any, lanes: int) -> None:
    any_number_of_columns(run, lanes)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", list(ZeroKind))
@pytest.mark.parametrize("lanes", [1, 4])
def test_numbers_that_the_fast_division_cannot_take(run: Any, kind: ZeroKind, lanes: int) -> None:
    w, upper, affine, group = with_odd_numbers(kind)
    for many in (group, [j // 32 for j in range(48)]):
        agrees(run(w, upper, affine, many, lanes), w, upper, affine, many, odd=True)
    for factor in (1e-35, 1e-12, 1e12, 1e35, torch.nan, 0.0):
        agrees(run(w, upper * factor, affine, group, lanes), w, upper * factor, affine, group, odd=True)


@pytest.mark.parametrize("run", RUNS)
def test_zeros_that_are_not_whole(run: Any) -> None:
    w, upper, affine, _ = problem(9, 64, "g_asym", 4, torch.float32)
    for zero in (affine.zero + 0.25, affine.zero + 3e6):
        odd = Affine(affine.scale, zero, 4, ZeroKind.CODE)
        agrees(run(w, upper, odd, [0] * 64, 1), w, upper, odd, [0] * 64, odd=True)


def test_division_is_that_of_the_processor() -> None:
    """Random mantissas, a just below b with both just below 2, and quotients next to the middle of two floats."""
    g = torch.Generator().manual_seed(1)
    wrong = torch.zeros(1, dtype=torch.int64)

    def check(a: Tensor, b: Tensor) -> None:
        native.call("gptq_lanes", "bitgrid_gptq_division", a.contiguous(), a.numel(), b.contiguous(), b.numel(), wrong)
        assert int(wrong) == 0

    ulp = 2.0**-23
    last = 2 - ulp * torch.arange(1, 400)
    some = 1 + ulp * torch.randint(0, 2**23, (200,), generator=g)
    check(torch.cat([last, some]), torch.cat([last, some]))
    check(-(2.0 ** torch.randint(-60, 60, (4000,), generator=g)) * (1 + torch.rand(4000, generator=g)), some[:100])
    # a = (m · b ± 1 unit) for m the middle of two floats: multiples of 2^-24, solved for in whole numbers.
    for b in (2**24 - torch.arange(1, 200, 2)).tolist() + (2**23 + torch.arange(1, 200, 2)).tolist():
        near = []
        for bits, sign in ((24, 1), (24, -1), (25, 1), (25, -1)):
            # The odd m below 2^bits · 2 with m · b = ± 1 modulo 2^bits.
            m = (sign * pow(b, -1, 2**bits)) % 2**bits
            for middle in (m, m + 2**bits):
                a, rest = divmod(middle * b - sign, 2**bits)
                if rest == 0 and 0 < a < 2**24:
                    near.append(float(a))
        if near:
            check(torch.tensor(near), torch.tensor([float(b)]))


@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling for two GPUs takes a minute")
@pytest.mark.parametrize(("architecture", "most"), [((9, 0), 255), ((8, 0), 255)])
def test_compiles_without_spills(architecture: tuple[int, int], most: int, tmp_path: Path) -> None:
    nvcc = on_cuda.compiler()
    if nvcc is None:
        pytest.skip("there is no CUDA compiler (nvcc)")
    command = [nvcc, "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", on_cuda.target(architecture)]
    source = native.SOURCES / "gptq_block.cu"
    done = subprocess.run([*command, str(source), "-o", str(tmp_path / "made")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 8  # plain: 1 lane by two, three, and four teams, these with one or three warps that help, 4, two rows; 1, 4
    assert max(registers) <= most
    two_blocks = re.search(r"ILi1ELb1ELi1ELi4ELi1E.*?Used (\d+) registers", done.stderr, re.DOTALL)
    assert two_blocks is not None
    assert int(two_blocks[1]) <= 128  # so that both have room
    moved = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert moved == [("0", "0", "0")] * 8, done.stderr[-3000:]
    tool = shutil.which("cuobjdump", path=str(Path(nvcc).parent))
    if tool is not None:
        said = subprocess.run([tool, "-sass", str(tmp_path / "made")], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"\b(LDL|STL)\b", said)


def test_what_another_twin_solves_is_said_and_recorded_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where both work, or this one alone."""
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    w = torch.zeros(4, 4, dtype=torch.float64)
    for reason, other in ((None, "triton"), ("there is no Triton", "torch")):
        monkeypatch.setattr(triton, "unavailable", lambda device, reason=reason: reason)
        for block, why in ((w, "takes float32, not torch.float64"), (torch.zeros(129, 4), "at most 128 columns"), (w.float(), "")):
            with recorded() as kernels:
                chosen = kernel("gptq_block", device="cuda", block=block)
            assert kernels == {"gptq_block": [chosen.backend]}
            assert chosen.backend == (other if why else "cuda")
            assert why in " ".join(chosen.notes)
    with pytest.raises(RuntimeError, match="takes float32"):
        kernel("gptq_block", "cuda", "cuda", block=w)
    with pytest.raises(ValueError, match="takes float32"):
        cuda.solve_block(w, w, Affine(w, w, 4, ZeroKind.CODE), [0] * 4)


def test_what_does_not_fit_is_said() -> None:
    w, upper, affine, group = problem(5, 16, "g_asym", 4, torch.float32)
    with pytest.raises(ValueError, match="out holds"):
        cuda.arguments(w, upper, affine, group, SolvedBlock.like(w[:8]))
    with pytest.raises(ValueError, match=r"out\.loss"):
        cuda.arguments(w, upper, affine, group, replace(SolvedBlock.like(w), loss=torch.zeros(4)))
    with pytest.raises(ValueError, match="group has"):
        cuda.arguments(w, upper, affine, [1] * 16, SolvedBlock.like(w))


@GPU
def test_many_rows_on_a_gpu_and_in_a_graph() -> None:
    """More rows than a wave of thread blocks, each way to share a row; a replay gives what a call does."""
    w, upper, affine, _ = problem(601, 128, "g_asym", 4, torch.float32)
    block, scale, zero = (t.repeat(1, 60).cuda() for t in (w, affine.scale, affine.zero))
    u, wide, group = upper.cuda(), Affine(scale, zero, 4, affine.kind), [j // 32 for j in range(128)]
    want = on_gpu(w, upper, affine, group, 1)
    agrees(want, w, upper, affine, group)
    many = block.shape[1] // 64 * 64
    two = block[:, :many].contiguous(), Affine(scale[:, :many].contiguous(), zero[:, :many].contiguous(), 4, affine.kind)
    by_teams = ((rows, 0) for rows in (8192, 12288, 16384))
    for rows, lanes in ((many, 0), (many, TWO_ROWS), (9600, TWO_ROWS), (6400, TWO_ROWS), *by_teams):
        affines = Affine(two[1].scale[:, :rows], two[1].zero[:, :rows], 4, affine.kind)
        assert equal(cuda.solve_block(two[0][:, :rows].contiguous(), u, affines, group, lanes=lanes), want, 60), (rows, lanes)
    for lanes in (0, 1, 4):
        out = poisoned(block)
        cuda.solve_block(block, u, wide, group, out, lanes=lanes)
        assert equal(out, want, 60), lanes
    graph, replayed = torch.cuda.CUDAGraph(), poisoned(block)
    with torch.cuda.graph(graph):
        cuda.solve_block(block, u, wide, group, replayed)
    graph.replay()
    torch.cuda.synchronize()
    assert equal(replayed, want, 60)
