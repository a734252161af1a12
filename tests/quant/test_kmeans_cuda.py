"""The CUDA k-means: its source on the host against the C++ and torch twins, what nvcc makes of it, and the kernel where there is a GPU.

Tolerance: both twins sum in float64 and differ in the order of sums alone; for values up to 1e4 in columns of a few hundred that is far
below 1e-9, and float32 centres come out equal but for one rounding.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels import kernel, on_cuda, recorded
from quant.kernels.kmeans_columns import STARTS, batched, cuda
from tests.quant.cuda_on_host import asked, on_the_host, spills_nothing
from tests.quant.test_kmeans import SHAPES, columns, is_fixed_point, squared_error

GPU_SIZES, GPU_CENTRES = (1, 31, 300, 4096, 4609, 11008, 14336), (2, 4, 16, 64)
CLOSE = {torch.float32: 2.0**-22, torch.float64: 1e-9}
on_a_gpu = pytest.mark.gpu("nvcc")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA twin, on CPU tensors."""
    on_the_host("kmeans_columns", monkeypatch)
    return cuda


def same(run: Any, x: Tensor, k: int, start: str, weights: Tensor | None = None) -> None:
    got, want = run.kmeans(x, k, start, weights), batched.kmeans(x, k, start, weights)
    assert (got.dtype, got.shape) == (x.dtype, want.shape)
    close = CLOSE.get(x.dtype, 2.0**-9) * float(x.double().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=close)
    assert torch.equal(run.nearest(x, want), batched.nearest(x, want))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_on_the_chip(host: Any, shape: str, start: str) -> None:
    for n, k in ((1, 1), (2, 2), (31, 3), (33, 16), (300, 2), (513, 16)):
        same(host, columns(shape, n, seed=n, count=2), k, start)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("n", "k"), [(4096, 16), (5000, 4), (11008, 16), (cuda.MOST_ROWS, 5)])
def test_long_columns_on_the_chip(host: Any, n: int, k: int, start: str) -> None:
    same(host, columns("normal", n, count=1), k, start)


@pytest.mark.parametrize("start", STARTS)
def test_columns_in_device_memory(host: Any, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same(host, columns("normal", cuda.MOST_ROWS + 1, count=1), 4, start)
    monkeypatch.setattr(cuda, "TOGETHER", 2)
    for shape in SHAPES:
        same(host, columns(shape, 333, count=3, dtype=torch.float64), 6, start)


def heaviness(n: int, count: int, seed: int = 0) -> Tensor:
    """Weights `[count, N]` over three powers of ten, as diagonals of Hessians; a fifth of them nothing."""
    u = columns("uniform", n, seed + 1, count, torch.float64)
    return 10 ** (3 * columns("uniform", n, seed + 2, count, torch.float64) - 1.5) * (u >= 0.2)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", ["heavy", "two", "rounded"])
def test_weighted_columns(host: Any, shape: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "TOGETHER", 2)
    for n, k in ((1, 1), (33, 16), (513, 16)):
        same(host, columns(shape, n, seed=n, count=2), k, start, heaviness(n, 2))
    x = columns(shape, 333, count=3, dtype=torch.float64)
    same(host, x, 6, start, heaviness(333, 3))
    same(host, x.float()[:1], 6, start, heaviness(333, 1)[0])


@pytest.mark.parametrize("start", STARTS)
def test_long_weighted_columns(host: Any, start: str) -> None:
    for n in (5000, cuda.MOST_WEIGHED + 1):
        same(host, columns("normal", n, count=1), 4, start, heaviness(n, 1)[0])


def test_values_that_weigh_nothing(host: Any) -> None:
    """All of them, all but one, and a cluster: it keeps its centre."""
    x = columns("two", 600, count=3)
    w = torch.zeros(3, 600)
    w[1, 77], w[2] = 3.0, 1.0 / 3.0 * (x[2] < 3)
    for start in STARTS:
        same(host, x, 8, start, w)
        assert torch.equal(host.kmeans(x.double(), 8, start, 4 * w)[2], host.kmeans(x.double(), 8, start, w)[2])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("k", [32, 33, 64, 256])
def test_many_centres(host: Any, k: int, start: str) -> None:
    same(host, columns("normal", 700, seed=k, count=1), k, start)


def test_other_types_and_few_values(host: Any) -> None:
    same(host, columns("heavy", 200, dtype=torch.float16), 4, "plus_plus")
    for few in ([1.5], [-0.0, 0.0], [-3.0, 1.0, 2.0]):
        x = torch.tensor(few)[torch.arange(100) % len(few)][None]
        for k in (1, 3, 4, 64):
            for start in STARTS:
                assert torch.equal(host.kmeans(x, k, start), batched.kmeans(x, k, start))


def test_no_columns(host: Any) -> None:
    assert host.kmeans(torch.empty(0, 9), 4).shape == (0, 4)


def test_a_device_can_start_what_is_launched(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids, threads and shared memory, with what CUB takes for sorting; among them what a device starts only if it is asked to."""
    launches = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: launches.append(asked(*given)))
    for n in (*GPU_SIZES, cuda.MOST_ROWS):
        for k in {1, *GPU_CENTRES, 5, 8, 31, 32, 33, 256}:
            for dtype in CLOSE:
                x = torch.zeros(5, n, dtype=dtype)
                for start in STARTS:
                    launches.clear()
                    host.kmeans(x, k, start)
                    host.nearest(x, torch.zeros(5, k, dtype=dtype))
                    assert [launch[:3] for launch in launches] == [(5, 1, cuda.THREADS), (5, -(-n // 1024), 256)]
                    if dtype is torch.float32 and n <= cuda.MOST_ROWS:
                        assert 0 <= cuda.shared_bytes(n, k, start) - cuda.STATIC - launches[0][3] <= cuda.SORTING
    launches.clear()
    host.kmeans(torch.zeros(1, 1), 2, "plus_plus")
    host.kmeans(torch.zeros(1, 500, dtype=torch.float64), 8, "partition")
    static = 20 * 1024
    assert all(shared < 48 * 1024 < shared + static for *_, shared in launches)


@pytest.mark.parametrize(("kilobytes", "longest", "longest_weighted"), [(99, 4608, 3000), (163, 11008, 6000), (227, 11008, 8704)])
def test_a_device_with_less_shared_memory_gets_other_forms(
    host: Any, monkeypatch: pytest.MonkeyPatch, kilobytes: int, longest: int, longest_weighted: int
) -> None:
    launches = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: launches.append((given[3], asked(*given)[3])))
    monkeypatch.setattr(on_cuda, "shared_memory", lambda device: 1024 * kilobytes)
    for n in (3000, 4608, 6000, 8704, 11008):
        for weights, most in ((None, longest), (torch.ones(n), longest_weighted)):
            host.kmeans(torch.zeros(2, n), 16, "plus_plus", weights)
            ordered, shared = launches.pop()
            assert isinstance(ordered, int) == (n <= most)
            assert shared + cuda.STATIC <= 1024 * kilobytes
    # A partition's costs for 32 centres find room nowhere but on the largest; of 16, everywhere.
    for k, runs in ((16, True), (32, kilobytes == 227)):
        with recorded() as found:
            host.kmeans(torch.zeros(2, 9000), k, "partition")
        assert ("kmeans_columns" in found, len(launches)) == (not runs, int(runs))
        assert all(shared + cuda.STATIC <= 1024 * kilobytes for _, shared in launches)
        launches.clear()


@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling takes a minute")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_nothing_is_spilled(architecture: str, tmp_path: Path) -> None:
    spills_nothing("kmeans_columns", architecture, tmp_path, 11)


@on_a_gpu
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu(shape: str, start: str) -> None:
    """Centres equal but where a tie of sums went the other way (among rounded values that is nothing rare): such a column must be about as
    good, a tenth being what starts differ by."""
    run = kernel("kmeans_columns", "cuda", "cuda").run
    for n in GPU_SIZES:
        for k in GPU_CENTRES:
            x = columns(shape, n, seed=n + k, count=5)
            got, want = run.kmeans(x.cuda(), k, start).cpu(), batched.kmeans(x, k, start)
            far = (got - want).abs().amax(1) > CLOSE[torch.float32] * x.abs().amax(1)
            assert int(far.sum()) <= (5 if shape == "rounded" else 1), (n, k)
            if bool(far.any()):
                assert bool((squared_error(x[far], got[far]) <= 1.1 * squared_error(x[far], want[far])).all()), (n, k)
            assert torch.equal(run.nearest(x.cuda(), want.cuda()).cpu(), batched.nearest(x, want))


@on_a_gpu
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_on_a_gpu(shape: str, start: str) -> None:
    """As without weights; on the chip and beside it, in float32 and float64."""
    run = kernel("kmeans_columns", "cuda", "cuda").run
    for n in (1, 31, 300, 4096, 4609, 8704, 11008):
        for k, dtype in ((2, torch.float32), (16, torch.float32), (64, torch.float32), (8, torch.float64)):
            x, w = columns(shape, n, seed=n + k, count=5, dtype=dtype), heaviness(n, 5)
            for weights in (w, w[0]):
                got, want = run.kmeans(x.cuda(), k, start, weights.cuda()).cpu(), batched.kmeans(x, k, start, weights)
                far = (got - want).abs().amax(1) > CLOSE[dtype] * x.abs().amax(1)
                assert int(far.sum()) <= (5 if shape == "rounded" else 1), (n, k)
                left = [(weights * (x.double()[:, :, None] - c.double()[:, None, :]).square().amin(2)).sum(1) for c in (got, want)]
                assert bool((left[0][far] <= 1.1 * left[1][far]).all()), (n, k)


@on_a_gpu
def test_on_a_gpu_alone_and_together_and_in_a_graph() -> None:
    run = kernel("kmeans_columns", "cuda", "cuda").run
    x = torch.cat([columns(shape, 4096) for shape in SHAPES]).cuda()
    for start in STARTS:
        for w in (None, heaviness(4096, 1)[0].cuda()):
            together = run.kmeans(x, 16, start, w)
            assert all(torch.equal(run.kmeans(row[None], 16, start, w)[0], centres) for row, centres in zip(x, together, strict=True))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run.kmeans(x, 16, start, w)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, together)
        if start == "partition":
            wide = x[:, :500].double()
            is_fixed_point(wide.cpu(), run.kmeans(wide, 8, start).cpu())
