"""BiLLM's searches in CUDA C++: their source on the host against torch's twin, what nvcc makes of it, and the kernels where there is a GPU.

Tolerances: those of test_braq_search.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.kernels import kernel, on_cuda
from quant.kernels.braq_block.eager import first_least, masks, ranked, reference_quantiles
from quant.kernels.braq_search import batched, cuda
from quant.kernels.braq_search.cuda import MOST_COLUMNS
from tests.quant.cuda_on_host import asked, on_the_host, spills_nothing
from tests.quant.test_braq_search import bound, values

SHAPES = [(1, 1), (7, 3), (33, 128), (65, 50), (40, 129), (3, MOST_COLUMNS)]
on_a_gpu = pytest.mark.gpu("nvcc")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA twin, on CPU tensors."""
    on_the_host("braq_search", monkeypatch)
    return cuda


def same(run: Any, device: str, n: int, c: int, tied: bool) -> None:
    x = values(n, c)
    for counts in (range(min(c, 49) + 1), range(min(c, 3), min(c, 3) + 1)):
        got = run.order_two_errors(x.to(device), counts).cpu()
        assert torch.allclose(got, batched.order_two_errors(x.double(), counts), rtol=0, atol=bound(x))
    x = values(n, c, tied)
    thresholds = torch.cat([torch.tensor([0.0, 1.0, 1e9]), reference_quantiles(x.abs())])
    for skip in (None, 0, min(c, 5), c):
        given = None if skip is None else torch.tensor(skip, device=device)
        got = run.split_errors(x.to(device), thresholds.to(device), given).cpu()
        want = batched.split_errors(x[:, skip or 0 :], thresholds) if skip != c else torch.zeros_like(got)
        assert torch.allclose(got, want, rtol=0, atol=1e-12 * float(x.double().square().sum()))


@pytest.mark.parametrize(("n", "c"), SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_both_searches(host: Any, n: int, c: int, tied: bool) -> None:
    same(host, "cpu", n, c, tied)


def test_what_is_refused(host: Any) -> None:
    with pytest.raises(ValueError, match=r"weights are torch.float64; the CUDA search takes torch.float32: use backend=torch"):
        host.split_errors(values(4, 4).double(), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"a block of 385 columns; the CUDA search takes up to 384 on this device: use backend=torch"):
        host.order_two_errors(values(2, MOST_COLUMNS + 1), [1])
    with pytest.raises(ValueError, match=r"1025 thresholds; the CUDA search takes up to 1024: use backend=torch"):
        host.split_errors(values(2, 4), torch.arange(1025.0))


def test_a_device_can_start_what_is_launched(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: launches.append(asked(*given)))
    for n, c in [*SHAPES, (4096, 128), (11008, 128)]:
        for number in (1, 25, 26, 50, 199, cuda.MOST_THRESHOLDS):
            x = torch.zeros(n, c)
            launches.clear()
            host.order_two_errors(x, [0] * number)
            host.split_errors(x, torch.zeros(number))
            assert [launch[:2] for launch in launches] == [(-(-n // 32), 1), (-(-n // 16), 1)]


def test_a_device_with_less_shared_memory_takes_narrower_blocks(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: launches.append(asked(*given)[3]))
    for kilobytes, most in ((99, 255), (163, 384), (227, 384)):
        monkeypatch.setattr(on_cuda, "shared_memory", lambda device, k=kilobytes: 1024 * k)
        assert host.refuses(torch.zeros(2, most)) is None
        assert host.refuses(torch.zeros(2, most + 1)) == f"a block of {most + 1} columns; the CUDA search takes up to {most} on this device"
        host.order_two_errors(torch.zeros(2, most), [1])
        host.split_errors(torch.zeros(2, most), torch.zeros(cuda.MOST_THRESHOLDS))
        assert max(launches) <= 1024 * kilobytes


@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling takes 3 s")
def test_nothing_is_spilled(tmp_path: Path) -> None:
    spills_nothing("braq_search", "90a", tmp_path, 2)


@on_a_gpu
@pytest.mark.parametrize(("n", "c"), [*SHAPES, (4096, 128), (11008, 128)])
@pytest.mark.parametrize("tied", [False, True])
def test_on_a_gpu(n: int, c: int, tied: bool) -> None:
    same(kernel("braq_search", "cuda", "cuda").run, "cuda", n, c, tied)


@on_a_gpu
def test_a_block_is_chosen_without_the_host_and_as_well_as_on_it() -> None:
    w = values(1000, 128)
    torch.cuda.set_sync_debug_mode("default")
    masks(w.cuda(), range(1, 50))  # what is kept from call to call
    block = w.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        salient, split = masks(block, range(1, 50))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    k = int(salient.sum())
    order = ranked(w.abs().sum(0))
    errors = batched.order_two_errors(w[:, order].double(), range(1, 50))
    assert errors[k - 1] <= errors[first_least(errors)] + bound(w)
    again = masks(w.cuda(), range(1, 50))
    assert torch.equal(again[0], salient)
    assert torch.equal(again[1], split)
