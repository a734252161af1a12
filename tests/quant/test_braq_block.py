"""A block of BiLLM's columns in CUDA C++: its source on the host against torch's form, what nvcc makes of it, and the kernel where there is
a GPU, alone and in whole linears.

Tolerances: with A the row's largest |w| of the block and u = 2^-24, a mean of C float32 is off by C u A in torch's form, the values less it
by as much and one rounding (2 u A), the mean of their sizes by (2 C + 2) u A; a second order adds as much again to what is left, and so on:
scales and means differ by 8 (C + 2) u A at most. The stored type adds one of its steps, 2^-10 of the value (2^-24 of small ones), as they
may round to either side. Signs are the same but where a value lies as near its mean; after such a tie of a salient weight its row's second
order is another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.binary import binarize
from quant.errors import ScaleDtypeError
from quant.kernels import Kernel, braq_block, kernel, on_cuda, recorded
from quant.kernels.braq_block import Binarized, Wanted, cuda, eager
from quant.methods.billm import Billm
from quant.scheme import WeightScheme
from quant.statistics import Statistics
from quant.tensors.binary import SALIENT, BinaryTensor, decode
from tests.quant.cuda_on_host import asked, on_the_host, spills_nothing
from tests.quant.slow_binary import layer

on_a_gpu = pytest.mark.gpu("nvcc")
HALF, FULL = torch.float16, torch.float32
CASES = [
    (1, 1, Wanted(128, HALF)),
    (3, 70, Wanted(33, FULL)),
    (40, 50, Wanted(32, HALF)),
    (65, 200, Wanted(96, FULL)),
    (33, 129, Wanted(128, HALF)),
    (20, 300, Wanted(256, FULL, hessian=False)),
    (9, 384, Wanted(512, HALF)),
    (70, 40, Wanted(16, FULL, salient=0)),
    (70, 40, Wanted(16, FULL, salient=99)),
    (70, 40, Wanted(16, HALF, hessian=False, salient=5)),
]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA twin, on CPU tensors."""
    on_the_host("braq_block", monkeypatch)
    return cuda


def weights(n: int, k: int, kind: str = "normal") -> tuple[Tensor, Tensor]:
    """And a factor of which the diagonal counts."""
    g = torch.Generator().manual_seed(n * k)
    w, diagonal = torch.randn(n, k, generator=g), 0.5 + torch.rand(k, generator=g)
    if kind == "tied":
        w = (2 * w).round()
    if kind == "near":  # values that differ in their last bits
        w = 1 + w * 2.0**-17
    if kind == "dead":
        w[:, ::3] = 0
        w[::4] = 0
    if kind == "equal":
        w, diagonal = torch.full((n, k), -0.7), torch.ones(k)
    return w, torch.diag(diagonal)


def made(run: Any, w: Tensor, upper: Tensor, wanted: Wanted) -> tuple[Binarized, Tensor]:
    """On the CPU: what a twin writes over flags that are neither and values that are none, and its errors `[N, K]`."""
    out = Binarized.like(w, wanted.block_size)
    for flags in (out.signs, out.second, out.split, out.salient):
        flags.view(torch.uint8).fill_(0xEE)
    for values in (out.scale, out.mean):
        values.fill_(torch.nan)
    before, solve = w.clone(), run.solver(w, upper, wanted, out)
    errors = torch.cat([solve(start).clone() for start in range(0, w.shape[1], wanted.block_size)], 1)
    assert torch.equal(w, before)
    for flags in (out.signs, out.second, out.split, out.salient):
        assert int(flags.view(torch.uint8).max()) <= 1
    fields = (out.signs, out.second, out.split, out.salient, out.scale, out.mean, out.wrong)
    return Binarized(*(t.cpu() for t in fields)), errors.cpu()


def agree(w: Tensor, upper: Tensor, wanted: Wanted, got: tuple[Binarized, Tensor], want: tuple[Binarized, Tensor]) -> None:
    (out, errors), (other, _) = got, want
    assert torch.equal(out.salient, other.salient)
    assert torch.equal(out.split, other.split)
    assert int(out.wrong) == int(other.wrong)
    step, least = (0.0, 0.0) if wanted.dtype is FULL else (2.0**-10, 2.0**-24)
    for b, start in enumerate(range(0, w.shape[1], wanted.block_size)):
        c = slice(start, min(start + wanted.block_size, w.shape[1]))
        x, salient, split, scale, mean = w[:, c], out.salient[c], out.split[:, c], out.scale[:, b], out.mean[:, b]
        largest = x.abs().amax(1, keepdim=True)
        bound = 8 * (x.shape[1] + 2) * 2.0**-24 * largest
        # In float64, from the masks: how far values are from their means.
        parts = [(binarize(x.double(), mask, order)) for mask, order in ((~salient & ~split, 1), (split, 1), (salient, 2))]
        centres = [p.mean[0] for p in parts]
        centre = torch.stack(centres, 1).gather(1, torch.where(salient, SALIENT, split.long()))
        first = x.double() - centre
        left = x.double() - (torch.where(first >= 0, 1, -1) * parts[2].scale[0][:, None] + centres[2][:, None]) - parts[2].mean[1][:, None]
        assert torch.equal(out.signs[:, c] | (first.abs() <= bound), (first >= 0) | (first.abs() <= bound))
        tied = (salient & (first.abs() <= bound)).any(1)
        sure = ~tied[:, None] & salient & (left.abs() > bound)
        assert torch.equal(out.second[:, c] & sure, (left >= 0) & sure)
        assert not out.second[:, c][:, ~salient].any()
        exact = [*(p.scale[0] for p in parts), parts[2].scale[1], centres[0], centres[1], parts[2].mean[0] + parts[2].mean[1]]
        for i, (mine, right) in enumerate(zip([*scale.unbind(1), *mean.unbind(1)], exact, strict=True)):
            near = (mine - right).abs() <= bound[:, 0] + step * right.abs() + least
            assert bool((near | (tied if i in (3, 6) else torch.zeros_like(tied))).all())
        # What is stored is what the errors are of, bit for bit.
        q = decode(out.signs[:, c], out.second[:, c], split, salient, scale, mean)
        assert torch.equal(errors[:, c], (x - q) / upper.diagonal()[c])
        assert torch.equal(scale, scale.to(wanted.dtype).float())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["normal", "dead"])
def test_blocks(host: Any, case: tuple[int, int, Wanted], kind: str) -> None:
    n, k, wanted = case
    w, upper = weights(n, k, kind)
    agree(w, upper, wanted, made(host, w, upper, wanted), made(eager, w, upper, wanted))


@pytest.mark.parametrize("kind", ["tied", "equal"])
def test_quantiles_and_ranks_of_equal_values(host: Any, kind: str) -> None:
    """Thresholds fall on values, and columns are as large as others."""
    for n, k, size in ((5, 20, 20), (40, 50, 32), (64, 130, 128)):
        w, upper = weights(n, k, kind)
        wanted = Wanted(size, FULL, hessian=False, salient=2)
        agree(w, torch.diag(upper.diagonal()), wanted, made(host, w, upper, wanted), made(eager, w, upper, wanted))


@pytest.mark.parametrize("kind", ["normal", "dead", "tied", "near"])
def test_quantiles_bit_for_bit(host: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they lie in what a block keeps, after 16 flags, a count (two words) and the threshold that was chosen, one of them."""
    states = []
    call = on_cuda.call
    monkeypatch.setattr(on_cuda, "call", lambda *given: (call(*given), states.append(given[-2])))
    for n, k in ((1, 1), (1, 3), (3, 40), (50, 130)):
        w, upper = weights(n, k, kind)
        out, _ = made(host, w, upper, Wanted(k, FULL, hessian=False))
        want = eager.reference_quantiles(w.masked_fill(out.salient, 0).abs())
        kept = states.pop()
        assert not kept[:16].any()
        assert int(kept[16]) == int(out.salient.sum())
        assert torch.equal(kept[19:100].view(FULL), want)
        assert float(kept[18:19].view(FULL)) in want.tolist()


def test_a_block_in_the_middle_reads_and_writes_its_own_columns(host: Any) -> None:
    w, upper = weights(20, 96)
    wanted, wide = Wanted(32, FULL), torch.randn(20, 200)
    wide[:, 50:146] = w
    whole, got = Binarized.like(w, 32), made(host, w, upper, wanted)[0]
    whole.signs.view(torch.uint8).fill_(7)
    whole.scale.fill_(7)
    cuda.solver(wide[:, 50:146], upper, wanted, whole)(32)
    assert torch.equal(whole.signs[:, 32:64], got.signs[:, 32:64])
    assert torch.equal(whole.scale[:, 1], got.scale[:, 1])
    for left in (whole.signs.view(torch.uint8)[:, :32], whole.signs.view(torch.uint8)[:, 64:], whole.scale[:, ::2]):
        assert bool((left == 7).all())


def test_values_that_their_type_does_not_hold_are_counted(host: Any) -> None:
    w, upper = weights(9, 40)
    wanted = Wanted(20, HALF, hessian=False, salient=3)
    for scale in (1e6, 1e-9):
        big = w.clone()
        big[2] *= scale
        counts = [int(made(run, big, upper, wanted)[0].wrong) for run in (host, eager)]
        assert counts[0] == counts[1] > 0


def test_saliencies_that_overflow_are_ranked_first(host: Any) -> None:
    """No count has an error that is a number: the least one is taken."""
    w, upper = weights(9, 40)
    w[3, 5] = 3e38
    out, _ = made(host, w, upper, Wanted(40, FULL))
    assert out.salient.nonzero().tolist() == [[5]]


def test_whole_linears_are_those_of_the_torch_form(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w, statistics = layer(30, 100, 3, FULL)
    want = Billm(block_size=32).quantize(w, statistics, WeightScheme(1))
    monkeypatch.setattr(braq_block, "chosen", lambda *given: Kernel(cuda, "cuda", ["a note"]))
    got = Billm(block_size=32).quantize(w, statistics, WeightScheme(1))
    same(got.tensor, want.tensor, 1.0, 2.0**-10)
    assert got.notes == ["a note"]
    assert got.details == want.details
    with pytest.raises(ScaleDtypeError, match="do not fit float16"):
        Billm()._run(ready_of(1e6 * w, statistics), HALF, [])


def ready_of(w: Tensor, statistics: Statistics) -> Any:
    from quant.methods.feedback import prepare

    return prepare("billm", w, statistics, 0.01)


def same(got: Any, want: Any, share: float, step: float) -> None:
    """In `share` of the flags, and of the scales to `step` of the largest."""
    assert isinstance(got, BinaryTensor)
    assert torch.equal(got.salient.cpu(), want.salient)
    for name in ("signs", "second", "split"):
        assert float((getattr(got, name).cpu() == getattr(want, name)).double().mean()) >= share
    off = (got.scale.cpu().float() - want.scale.float()).abs() > step * want.scale.abs().max()
    assert float(off.double().mean()) <= 1 - share


def test_what_is_refused(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(384, FULL)
    assert host.refuses(torch.zeros(2, 500), wanted) is None
    for w, size, reason in (
        (torch.zeros(2, 9, dtype=torch.float64), 4, "weights are torch.float64; the CUDA block takes torch.float32"),
        (torch.zeros(2, 500), 385, "a block of 385 columns; the CUDA block takes up to 384 on this device"),
        (torch.zeros(9, 2).T, 4, "the weights of a row do not lie one after another, as the CUDA block takes them"),
        (torch.zeros(1).expand(2**23, 129), 129, f"a block of {2**23} x 129 weights; the CUDA block takes up to {2**30}"),
    ):
        assert host.refuses(w, Wanted(size, FULL)) == reason
        with pytest.raises(ValueError, match=f"{reason}: use backend=torch"):
            host.solver(w, torch.eye(w.shape[1]) if w.shape[1] < 500 else torch.zeros(0), Wanted(size, FULL), None)
    monkeypatch.setattr(on_cuda, "shared_memory", lambda device: 99 * 1024)
    assert host.refuses(torch.zeros(2, 500), Wanted(255, FULL)) is None
    assert host.refuses(torch.zeros(2, 500), wanted) == "a block of 384 columns; the CUDA block takes up to 255 on this device"
    with recorded() as ran:
        braq_block.chosen(torch.zeros(2, 9), wanted)
    assert ran == {"braq_block": ["torch"]}


def test_a_device_can_start_what_is_launched(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of seven launches; the others' sizes are refused by the call."""
    launches: list[tuple[int, int, int, int]] = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: launches.append(asked(*given)))
    for n, k, size in ((1, 1, 1), (4096, 128, 128), (11008, 128, 128), (300, 384, 384), (300, 255, 255)):
        for salient in (None, 1):
            w, wanted = torch.zeros(n, k), Wanted(size, HALF, salient=salient)
            cuda.solver(w, torch.zeros(1).expand(k, k), wanted, Binarized.like(w, size))(0)
            assert launches.pop() == (-(-n // 8), 1, 256, 0)
    monkeypatch.setattr(cuda, "STATE_WORDS", cuda.STATE_WORDS - 1)
    with pytest.raises(AssertionError, match="would not start"):
        cuda.solver(w, torch.eye(k), wanted, Binarized.like(w, size))(0)


@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling takes 5 s")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_nothing_is_spilled(architecture: str, tmp_path: Path) -> None:
    spills_nothing("braq_block", architecture, tmp_path, 9)


@on_a_gpu
@pytest.mark.parametrize("case", [*CASES, (4096, 256, Wanted(128, HALF)), (11008, 128, Wanted(128, HALF))])
@pytest.mark.parametrize("kind", ["normal", "dead"])
def test_on_a_gpu(case: tuple[int, int, Wanted], kind: str) -> None:
    n, k, wanted = case
    w, upper = weights(n, k, kind)
    run = kernel("braq_block", "cuda", "cuda").run
    got = made(run, w.cuda(), upper.cuda(), wanted)
    agree(w, upper, wanted, got, made(eager, w, upper, wanted))
    for mine, again in zip(got[0].__dict__.values(), made(run, w.cuda(), upper.cuda(), wanted)[0].__dict__.values(), strict=True):
        assert torch.equal(mine, again)


@on_a_gpu
def test_the_host_waits_for_nothing() -> None:
    w, upper = (t.cuda() for t in weights(300, 256))
    for run in (kernel("braq_block", "cuda", "cuda").run, eager):
        out = Binarized.like(w, 128)
        solve = run.solver(w, upper, Wanted(128, HALF), out)
        solve(0)  # what is kept from call to call
        torch.cuda.set_sync_debug_mode("error")
        try:
            solve(128)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_whole_linears_on_a_gpu_are_those_on_a_cpu() -> None:
    """The factor of the Hessian differs by rounding. A tie of choices that went the other way would change one of four blocks, and through
    its errors some flags of those after it: what fits a linear whose seed makes none is one flag in a thousand, those near their means."""
    w, statistics = layer(512, 512, 0, FULL)
    want = Billm().quantize(w, statistics, WeightScheme(1))
    with recorded() as ran:
        assert statistics.hessian is not None
        got = Billm().quantize(w.cuda(), Statistics(hessian=statistics.hessian.cuda()), WeightScheme(1))
    assert ran["braq_block"] == ["cuda"]
    assert "braq_search" not in ran
    same(got.tensor, want.tensor, 0.999, 2.0**-10)
    torch.testing.assert_close(got.tensor.dequantize().cpu().norm(), want.tensor.dequantize().norm(), rtol=1e-3, atol=0)
