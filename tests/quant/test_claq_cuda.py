"""A block of CLAQ's columns in CUDA C++: its source on the host, column by column against plain torch, what nvcc makes of it, and the
kernel where there is a GPU.

All but k-means is exact: given its tables, codes, reserved weights and errors are those of plain operations, bit for bit. Its centres are
float64 sums in another order than the torch twin's: equal but for one rounding (see test_kmeans_cuda.py), and one more of the stored type.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels import kernel, on_cuda, recorded
from quant.kernels.claq_block import Found, SolvedBlock, Wanted, cuda
from quant.kernels.kmeans_columns import STARTS, batched
from quant.kernels.kmeans_columns import cuda as kmeans_cuda
from quant.methods.claq import tails
from tests.quant.cuda_on_host import asked, on_the_host, spills_nothing
from tests.quant.test_claq_block import factor, solved
from tests.quant.test_kmeans import columns

ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
on_a_gpu = pytest.mark.gpu("nvcc")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA twin, on CPU tensors."""
    on_the_host("claq_block", monkeypatch)
    return cuda


def is_right(x: Tensor, upper: Tensor, wanted: Wanted, made: tuple[SolvedBlock, Found], most_far: int = 0) -> None:
    """most_far: columns where a tie of sums may have gone the other way."""
    out, found = made
    number_far = 0
    assert found.wrong is not None
    assert not found.wrong.any()
    for j, width in enumerate(wanted.widths):
        column, k = x[j].clone(), 2**width
        for i in range(j):
            column -= upper[i, j] * out.errors[i]
        table = found.tables[j].float()
        assert bool((table[k:] == 0).all())
        table, size = table[:k], float(column.abs().max())
        far = (2.0**-22 + ROUNDING[wanted.dtype]) * size
        if wanted.centres is None:
            number_far += bool(((table - batched.kmeans(column[None], k, wanted.start)[0]).abs() > far).any())
        else:
            assert torch.equal(table, wanted.centres[j, :k].to(wanted.dtype).float())
        codes = batched.nearest(column[None], table[None])[0].long()
        assert torch.equal(out.codes[j], codes.byte())
        values, mask = table[codes], torch.zeros(len(column), dtype=torch.bool)
        if wanted.tails is not None:
            top, bottom = wanted.tails[j]
            ranked = column.sort().values
            mask = (column >= ranked[-top]) | (column <= (ranked[bottom - 1] if bottom else -torch.inf))
            own = column.to(wanted.dtype).float()
            mask &= ~((own == values) & ((own == values).all() | (mask.sum() > top + bottom)))
            values = torch.where(mask, own, values)
            assert found.kept is not None
            assert torch.equal(found.kept[j], mask)
        assert torch.equal(out.values[j], values)
        assert torch.equal(out.errors[j], (column - values) / upper[j, j])
    assert number_far <= most_far


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("shape", "n", "widths", "fraction", "stored"),
    [
        ("normal", 300, [2] * 4, None, torch.float16),
        ("heavy", 513, [2, 4, 3], 0.014, torch.float16),
        ("rounded", 40, [2, 3], 0.014, torch.bfloat16),
        ("two", 1, [1, 2], 0.004, torch.float32),
        ("one_far", 4700, [5], 0.004, torch.float32),
    ],
)
def test_blocks(host: Any, start: str, shape: str, n: int, widths: list[int], fraction: float | None, stored: torch.dtype) -> None:
    x, upper = columns(shape, n, seed=n, count=len(widths)), factor(len(widths))
    ends = None if fraction is None else [tails(n, fraction)] * len(widths)
    wanted = Wanted(widths, ends, stored, start)
    is_right(x, upper, wanted, solved(host, x, upper, wanted))


@pytest.mark.parametrize("fraction", [None, 0.014])
def test_centres_that_are_given(host: Any, fraction: float | None) -> None:
    x, upper, widths = columns("heavy", 513, count=3), factor(3), [2, 4, 3]
    centres = columns("normal", 16, 1, 3).sort(1).values
    wanted = Wanted(widths, fraction and [tails(513, fraction)] * 3, torch.float16, "partition", centres)
    is_right(x, upper, wanted, solved(host, x, upper, wanted))


def test_errors_reach_all_later_columns(host: Any) -> None:
    """More columns than a block of threads takes an error off, more rows than it has threads."""
    x, upper = columns("normal", 513, count=18), factor(18) * 0.5
    wanted = Wanted([1] * 18, None, torch.float32, "plus_plus")
    is_right(x, upper, wanted, solved(host, x, upper, wanted))


def test_equal_weights_and_what_does_not_fit(host: Any) -> None:
    x = torch.full((2, 50), 0.7)
    x[1, ::2] = -0.3
    wanted = Wanted([1, 2], [(1, 1)] * 2, torch.float32, "plus_plus")
    made = solved(host, x, torch.eye(2), wanted)
    is_right(x, torch.eye(2), wanted, made)
    assert made[1].kept is not None
    assert not made[1].kept.any()
    x = columns("normal", 60, count=2)
    for scale, pair, expected in ((1e6, (0.0, 0.0), [True, True]), (1.0, (66000.0, 60000.0), [False, True])):
        given = scale * x
        given[1, :2] = torch.tensor(pair)
        found = solved(host, given, torch.eye(2), Wanted([1, 1], [(1, 0)] * 2, torch.float16, "partition"))[1]
        assert found.wrong is not None
        assert found.wrong.tolist() == expected


def test_float64_and_long_columns_go_to_the_loop(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cuda, "call", None)
    for x in (columns("normal", 40, count=2, dtype=torch.float64), columns("normal", cuda.MOST_ROWS + 1, count=1)):
        upper, wanted = torch.eye(len(x)).to(x), Wanted([2] * len(x), None, torch.float32, "partition")
        want = solved(kernel("claq_block", "torch").run, x, upper, wanted)
        assert torch.equal(solved(host, x, upper, wanted)[0].codes, want[0].codes)


def test_a_device_can_start_what_is_launched(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last launch of a block of two columns: nothing is left to take errors off."""
    launches = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: launches.append(asked(*given)))
    for n in (1, 4096, 4609, 11008, cuda.MOST_ROWS):
        for start in STARTS:
            for width in (1, 2, 4, 5, 8):
                solved(host, torch.zeros(2, n), torch.eye(2), Wanted([width] * 2, None, torch.float16, start))
    assert {launch[:3] for launch in launches} == {(1, 1, kmeans_cuda.THREADS)}
    launches.clear()
    solved(host, torch.zeros(1, 4096), torch.eye(1), Wanted([2], None, torch.float16, "plus_plus"))
    assert launches[0][3] == 4 * 512 * 9 + 8 * 4097


def test_a_device_with_less_shared_memory_hands_over_what_finds_no_room(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: launches.append(asked(*given)[3]))
    for kilobytes, shorter in ((99, True), (163, False), (227, False)):
        monkeypatch.setattr(on_cuda, "shared_memory", lambda device, k=kilobytes: 1024 * k)
        for n, start, centres, fits in (
            (4096, "plus_plus", None, True),
            (4096, "partition", None, not shorter),
            (4096, "partition", torch.zeros(2, 16), True),
            (9000, "plus_plus", None, not shorter),
        ):
            launches.clear()
            with recorded() as found:
                solved(host, torch.zeros(2, n), torch.eye(2), Wanted([4] * 2, None, torch.float16, start, centres))
            assert (found.get("claq_block"), bool(launches)) == (None if fits else ["torch"], fits)
            assert all(shared + kmeans_cuda.STATIC <= 1024 * kilobytes for shared in launches)


@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling takes 30 s")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_nothing_is_spilled(architecture: str, tmp_path: Path) -> None:
    spills_nothing("claq_block", architecture, tmp_path, 6)


@on_a_gpu
@pytest.mark.parametrize("start", [*STARTS, "given"])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_on_a_gpu(start: str, stored: torch.dtype) -> None:
    """Blocks of 128 columns with mixed widths and kept weights; without the host between columns."""
    run = kernel("claq_block", "cuda", "cuda").run
    for n in (300, 4096, 11008):
        x, upper = columns("normal", n, count=128), factor(128) * 0.1 + 0.9 * torch.eye(128)
        centres = columns("normal", 16, 1, 128).sort(1).values if start == "given" else None
        plan = [2, 4] * 64, [tails(n, 0.004)] * 128, stored, "partition" if start == "given" else start
        wanted, given = Wanted(*plan, centres), Wanted(*plan, None if centres is None else centres.cuda())
        solved(run, x.cuda(), upper.cuda(), given)  # what is kept from call to call
        there, factor_there, out = x.cuda(), upper.cuda(), SolvedBlock.like(x.cuda())
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run.solve_block(there, factor_there, given, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.kept is not None
        assert found.wrong is not None
        made = SolvedBlock(out.codes.cpu(), out.values.cpu(), out.errors.cpu())
        is_right(x, upper, wanted, (made, Found(found.tables.cpu(), found.kept.cpu(), found.wrong.cpu())), most_far=2)
