"""Products with packed codes against float64 on the same codes.

Tolerances. `size` is A = Σ |x| (|code · scale| + |offset|), the most that any partial sum can be, u = 2^-24 (2^-8 for bfloat16, in
which only the result is rounded). Between a product and the result lie at most 2 · 16 roundings of a group's sum, 4 for each of K / 32
groups, and 8 of lanes, offset, input scale and result: each is off by u A at most. That holds for every output. As a whole the error is
at most twice that of torch's product in the same type with the dequantized weight, and u A: codes are multiplied before their zero is
taken off.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from quant.affine import ZeroKind
from quant.kernels import TABLE, kernel
from quant.kernels.library import operands
from quant.kernels.native import library
from quant.kernels.products import with_many_rows
from quant.kernels.wq_gemv import BITS, cpu, prepare, reference
from quant.tensors.affine import AffineTensor
from tests.quant.products_affine import U_BFLOAT16, U, check, exact, inputs, stored

FAST = cpu.unavailable(torch.device("cpu")) is None
needs_library = pytest.mark.skipif(not FAST, reason="there is no C++ library")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "kind"), list(zip([32, 64, 96, 128, 0], ZeroKind, strict=True)))
def test_error_is_that_of_rounding(bits: int, group: int, kind: ZeroKind) -> None:
    """The kind of a zero only makes the offset, which the kernel takes as it is: one kind with each width of groups."""
    for n, k in ((13, 3 * group), (3, group)) if group else ((13, 352), (1, 32)):
        for dtype, scaled in ((torch.float16, False), (torch.float32, True)):
            tensor = stored(n, k, bits, group or k, kind, dtype, scaled)
            packed = prepare(tensor)
            for m in (1, 3, 8):
                for x in (inputs(m, k), inputs(m, k, torch.bfloat16)):
                    check(cpu.wq_gemv(x, packed), x, tensor)


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_longer_rows_and_one_scale_per_tensor(bits: int) -> None:
    for tensor in (stored(17, 1376, bits, 32), stored(17, 11008, bits, 128), stored(9, 4096, bits, 4096)):
        check(cpu.wq_gemv(inputs(2, tensor.shape[1]), prepare(tensor)), inputs(2, tensor.shape[1]), tensor)
    whole = AffineTensor(tensor.codes, tensor.scale[-1:], tensor.zero[-1:], bits, tensor.kind)
    check(cpu.wq_gemv(inputs(2, 4096), prepare(whole)), inputs(2, 4096), whole)


@pytest.mark.parametrize("bits", range(1, 9))
def test_reference_takes_every_affine_tensor(bits: int) -> None:
    for kind in ZeroKind:
        tensor = stored(5, 60, bits, 20, kind, torch.float32, True)
        shuffled = replace(tensor, g_idx=torch.arange(60, dtype=torch.uint8) % 3)
        x = inputs(3, 60)
        for given in (tensor, shuffled):
            got = reference.wq_gemv(x, reference.prepare(given))
            want, size = exact(x, given)
            # Rounded once; sums of 60 in float64.
            assert ((got.double() - want).abs() <= U * want.abs() + 2.0**-45 * size).all()


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_exact(bits: int) -> None:
    """Also what the reference makes of a packed weight; -zero · scale has 24 bits at most where scales are float16."""
    for kind in ZeroKind:
        for n, k, group in ((1, 32, 32), (9, 96, 32), (8, 512, 128), (13, 352, 352)):
            tensor = stored(n, k, bits, group, kind)
            packed = prepare(tensor)
            assert torch.equal(packed.codes(), tensor.codes)
            scale, zero = (t.double().repeat_interleave(group, 1) for t in (tensor.scale, tensor.zero))
            codes = tensor.codes.double()
            assert torch.equal(packed.values(torch.float64), codes * scale + zero if kind is ZeroKind.MINIMUM else (codes - zero) * scale)
            x = inputs(2, k)
            assert torch.allclose(reference.wq_gemv(x, packed), reference.wq_gemv(x, tensor), rtol=2 * U, atol=1e-13)


@needs_library
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), [(13, 352, 32), (3, 256, 256), (8, 96, 96), (17, 672, 96)])
def test_the_weight_is_made_again(bits: int, n: int, k: int, group: int) -> None:
    packed = prepare(stored(n, k, bits, group))
    want = packed.values(torch.float64)
    scale, offset = packed.ranges.double().abs().amax((0, 1, 3))
    # A product and a sum are rounded.
    assert ((kernel("wq_gemv", "cpu").run.values(packed).double() - want).abs() <= 2 * U * (2**bits * scale + offset)).all()


@needs_library
@pytest.mark.parametrize("scaled", [False, True])
def test_many_rows_are_multiplied_with_the_weight(scaled: bool) -> None:
    tensor = stored(5, 96, 4, 32, scaled=scaled)
    for dtype, rounded in ((torch.float32, 0.0), (torch.bfloat16, U_BFLOAT16)):
        x = inputs(40, 96, dtype)
        want, size = exact(x, tensor)
        got = with_many_rows(x, prepare(tensor), kernel("wq_gemv").run)
        bound = (96 + 4) * U * size
        assert got.dtype is dtype
        assert ((got.double() - want).abs() <= bound + rounded * (want.abs() + bound)).all()


def test_bytes_are_those_of_the_codes_and_ranges() -> None:
    for bits in BITS:
        packed = prepare(stored(16, 512, bits, 128, scaled=True))
        assert packed.bytes == 16 * 512 * bits // 8 + 16 * 4 * 2 * 4 + 512 * 4


@needs_library
def test_every_output_is_written_and_nothing_else() -> None:
    for bits in BITS:
        for n, m in ((1, 1), (13, 8), (31, 5)):
            tensor = stored(n, 160, bits, 32)
            for dtype in (torch.float32, torch.bfloat16):
                x = inputs(m, 160, dtype)
                memory = torch.full((m * n + 64,), torch.nan, dtype=dtype)
                out = memory[: m * n].view(m, n)
                assert cpu.wq_gemv(x, prepare(tensor), out) is out
                assert torch.equal(out, cpu.wq_gemv(x, prepare(tensor)))
                assert not out.isnan().any()
                assert memory[m * n :].isnan().all()


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_the_weight_and_of_x_stand_alone(bits: int) -> None:
    """Bit for bit: rows of the weight in another order, and one row of x beside any others."""
    tensor = stored(29, 384, bits, 96)
    x = inputs(8, 384)
    whole = cpu.wq_gemv(x, prepare(tensor))
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0))
    turned = replace(tensor, codes=tensor.codes[order], scale=tensor.scale[order], zero=tensor.zero[order])
    assert torch.equal(cpu.wq_gemv(x, prepare(turned)), whole[:, order])
    for m in range(1, 8):
        assert torch.equal(cpu.wq_gemv(x[:m], prepare(tensor)), whole[:m])
    assert torch.equal(cpu.wq_gemv(x.bfloat16(), prepare(tensor)), cpu.wq_gemv(x.bfloat16().float(), prepare(tensor)).bfloat16())
    strided = x.T.contiguous().T
    assert torch.equal(cpu.wq_gemv(strided, prepare(tensor)), whole)


@needs_library
@pytest.mark.usefixtures("two_threads")
def test_threads_give_equal_bits() -> None:
    """The weight is large enough for two of them."""
    for bits in BITS:
        packed, x = prepare(stored(1029, 1024, bits, 64)), inputs(3, 1024)
        two = cpu.wq_gemv(x, packed)
        torch.set_num_threads(1)
        assert torch.equal(cpu.wq_gemv(x, packed), two)
        torch.set_num_threads(2)


@needs_library
@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    packed, x = prepare(stored(1029, 1024, 4, 64)), inputs(1, 1024)
    want = cpu.wq_gemv(x, packed)
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if torch.equal(cpu.wq_gemv(x, packed), want) else 1
        finally:
            os._exit(code)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child did not end")


def test_what_the_layout_cannot_hold_is_refused() -> None:
    tensor = stored(4, 96, 4, 32)
    for wrong, message in (
        (stored(4, 96, 5, 32), r"codes of 5 bits; the packed layout has 2, 3, 4, 8: use backend=reference"),
        (replace(tensor, g_idx=torch.arange(96, dtype=torch.uint8) % 3), r"given by g_idx .*: use backend=reference"),
        (stored(4, 96, 4, 48), r"groups of 48 columns of 96; the packed layout takes multiples of 32: use backend=reference"),
        (stored(4, 40, 4, 40), r"groups of 40 columns of 40"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(wrong)


@pytest.mark.parametrize("backend", [b for b in TABLE["wq_gemv"] if b == "reference" or (b == "cpu" and FAST)])
def test_other_inputs_are_refused(backend: str) -> None:
    run, packed = kernel("wq_gemv", backend).run, prepare(stored(4, 96, 4, 32))
    for x in (inputs(9, 96), inputs(1, 64), inputs(1, 96)[0], inputs(1, 96, torch.float16), inputs(1, 96)[:0]):
        with pytest.raises(ValueError, match=r"it must be float32 or bfloat16 \[1 to 8, 96\]"):
            run.wq_gemv(x, packed)
    for out in (torch.empty(2, 5), torch.empty(2, 4, dtype=torch.float64), torch.empty(4, 2).T):
        with pytest.raises(ValueError, match=r"it must be contiguous \(2, 4\), torch.float32"):
            run.wq_gemv(inputs(2, 96), packed, out)


def test_without_a_compiler_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    try:
        chosen = kernel("wq_gemv")
        assert chosen.backend == "reference"
        assert "there is no C++ compiler" in chosen.notes[0]
        tensor = stored(5, 96, 3, 32, scaled=True)
        got = torch.ops.bitgrid.wq_gemv(inputs(2, 96), *operands(prepare(tensor)))
        check(got, inputs(2, 96), tensor)
    finally:
        library.cache_clear()


def test_an_operator_is_the_kernel() -> None:
    columns = torch.randn(2, 40)
    assert torch.equal(torch.ops.bitgrid.kmeans_columns(columns, 4), kernel("kmeans_columns").run.kmeans(columns, 4))
