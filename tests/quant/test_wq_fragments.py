"""The product on a GPU's tensor cores: its layout, and what a warp does, on the host and lane by lane; on a GPU, where there is one.

Tolerances are those of test_wq_gemv.py, with a term for tensor cores, which cut sums off where others round: a product of 16 columns is
off by 2 u times the most that a partial sum can be, where the bound has 16 u for adding them up. Where x is bfloat16, operands are
128 · 2^-place + code (with 8 bits, 256 + code in two products), and as much is taken off again: both count as parts of A.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.affine import ZeroKind
from quant.kernels import kernel, native, on_cuda
from quant.kernels.library import operands
from quant.kernels.products import given_to, with_many_rows
from quant.kernels.wq_gemv import BITS, Packed, reference
from quant.kernels.wq_gemv import cuda as twin
from quant.kernels.wq_gemv import prepare as tiles_of_eight
from quant.kernels.wq_gemv.fragments import Fragments, laid_out, prepare
from quant.tensors.affine import AffineTensor
from tests.quant.products_affine import U, check, exact, inputs, stored

needs_device = pytest.mark.gpu("nvcc")
ROOM = 1 << 17
"""Bytes of shared memory that the host's warps have where a test is not about that."""
CASES = [(13, 384, 128), (40, 1152, 384), (33, 352, 352), (7, 192, 64), (17, 1088, 32), (18, 672, 96), (1, 32, 32)]
"""(N, K, group)."""


def host_is_built() -> None:
    """Or skips the test. Not when tests are collected: those on a device need no such library."""
    reason = native.unavailable("wq_fragments", torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)


def on_host(x: Tensor, packed: Packed, room: int = ROOM) -> Tensor:
    host_is_built()
    out = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype)
    half = int(packed.ranges.dtype is torch.float16)
    numbers = (*packed.shape, packed.groups, packed.bits, x.shape[0], half, int(x.dtype is torch.bfloat16), room)
    scale = 0 if packed.input_scale is None else packed.input_scale
    native.call("wq_fragments", "bitgrid_wq_gemv", packed.words, packed.ranges, x, scale, out, *numbers)
    return out


def on_device(x: Tensor, packed: Packed, room: int = ROOM) -> Tensor:
    out = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype, device="cuda")
    return twin.wq_gemv(x.cuda(), moved(packed, "cuda"), out).cpu()


def checked(got: Tensor, x: Tensor, tensor: AffineTensor) -> None:
    base = 0 if x.dtype is torch.float32 or tensor.input_scale is not None else 256 if tensor.bits == 8 else 128
    check(got, x, tensor, base)


def moved(packed: Packed, device: str) -> Packed:
    scale = None if packed.input_scale is None else packed.input_scale.to(device)
    return replace(packed, words=packed.words.to(device), ranges=packed.ranges.to(device), input_scale=scale)


PLACES = [pytest.param(on_host, id="host"), pytest.param(on_device, marks=needs_device, id="device")]
Product = Callable[[Tensor, Packed], Tensor]


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_exact(bits: int) -> None:
    for kind in ZeroKind:
        for dtype in (torch.float16, torch.float32):
            for n, k, group in ((1, 32, 32), (17, 96, 32), (8, 512, 128), (40, 352, 352)):
                tensor = stored(n, k, bits, group, kind, dtype)
                packed = prepare(tensor)
                assert torch.equal(packed.codes(), tensor.codes)
                assert (packed.ranges.dtype is torch.float16) == (dtype is torch.float16 and kind is not ZeroKind.MINIMUM)
                want, got = reference.values(tensor).double(), reference.values(packed).double()
                size = (2**bits * tensor.scale.abs() + (tensor.zero * (1 if kind is ZeroKind.MINIMUM else tensor.scale)).abs()).max()
                # float32: of a zero times a scale, a product and a sum, on both sides.
                assert ((got - want).abs() <= 6 * U * float(size)).all()


def test_a_zero_too_large_for_float16_is_kept() -> None:
    tensor = stored(4, 32, 8, 32, ZeroKind.INTEGER)
    packed = prepare(replace(tensor, zero=torch.full_like(tensor.zero, 2049)))
    assert packed.ranges.dtype is torch.float32
    assert packed.ranges[0, 0, :4, 0, 1].double().equal(-2049 * tensor.scale[:, 0].double())


def test_each_code_has_bits_of_its_own() -> None:
    """One code at a time is the highest: no two share a bit, and all bits are used."""
    for bits in BITS:
        codes = torch.zeros(2048, 16, 128, dtype=torch.uint8)
        codes.view(2048, 2048).fill_diagonal_(2**bits - 1)
        words = laid_out(codes.view(-1, 128), bits).view(2048, -1)
        # As many bits as there are; sums of 2^32 - 1 take all 32 of a word, once each.
        assert ((words.long() & 2**32 - 1).sum(0) == 2**32 - 1).all()


def test_bytes_are_those_that_a_call_reads() -> None:
    for bits in BITS:
        half, single = (prepare(stored(32, 512, bits, 128, dtype=dtype, scaled=True)) for dtype in (torch.float16, torch.float32))
        assert half.bytes == 32 * 512 * bits // 8 + 32 * 4 * 2 * 2 + 512 * 4
        assert single.bytes == half.bytes + 32 * 4 * 2 * 2


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), CASES)
def test_error_is_that_of_rounding(product: Product, bits: int, n: int, k: int, group: int) -> None:
    kinds = list(ZeroKind)
    for i, (dtype, scaled) in enumerate(((torch.float16, False), (torch.float32, True))):
        tensor = stored(n, k, bits, group, kinds[(n + bits + i) % len(kinds)], dtype, scaled)
        packed = prepare(tensor)
        for m, kind in ((1, torch.bfloat16), (8, torch.bfloat16), (3, torch.float32)):
            x = inputs(m, k, kind)
            checked(product(x, packed), x, tensor)


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize("bits", BITS)
def test_more_steps_than_the_ring_or_shared_memory_holds(product: Product, bits: int) -> None:
    for n, k, group, m in ((17, 8 * 128 * 9 + 128, 128, 2), (3, 8 * 128 * 3 + 64, 64, 5), (35, 8 * 128 * 7 + 96, 8 * 128 * 7 + 96, 13)):
        tensor, x = stored(n, k, bits, group), inputs(m, k, torch.bfloat16)
        packed = prepare(tensor)
        whole = product(x, packed)
        checked(whole, x, tensor)
        if product is on_host:
            # Rings that are as short as can be: the sums are the same, in the same order.
            assert torch.equal(on_host(x, packed, 1), whole)


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_the_weight_and_of_x_stand_alone(product: Product, bits: int) -> None:
    tensor, x = stored(29, 384, bits, 96), inputs(8, 384)
    packed = prepare(tensor)
    whole, half = product(x, packed), product(x.bfloat16(), packed)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0))
    turned = replace(tensor, codes=tensor.codes[order], scale=tensor.scale[order], zero=tensor.zero[order])
    assert torch.equal(product(x, prepare(turned)), whole[:, order])
    for m in (1, 2, 3, 7):
        assert torch.equal(product(x[:m], packed), whole[:m])
        assert torch.equal(product(x[:m].bfloat16(), packed), half[:m])
    assert torch.equal(product(x.flip(0).contiguous(), packed), whole.flip(0))
    # Both are near the product; operands are not the same.
    for kind in (torch.bfloat16, torch.float32):
        checked(product(x.bfloat16().to(kind), packed), x.bfloat16().to(kind), tensor)


TEAMS = [(4, 40, 1152, 384), (4, 29, 1088, 32), (2, 70, 384, 128), (3, 33, 352, 352), (8, 21, 192, 64), (8, 50, 1152, 128)]
"""(bits, N, K, group), among them such as teams on the host multiply: wq_fragments.cpp."""


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize(("bits", "n", "k", "group"), TEAMS)
def test_more_rows_of_x_than_a_product_has_columns(product: Product, bits: int, n: int, k: int, group: int) -> None:
    """Right, and the same bits as alone or beside fewer."""
    for dtype in (torch.float16, torch.float32):
        tensor, x = stored(n, k, bits, group, dtype=dtype), inputs(16, k).bfloat16()
        packed = prepare(tensor)
        whole = product(x, packed)
        checked(whole, x, tensor)
        assert torch.equal(product(x.flip(0).contiguous(), packed), whole.flip(0))
        # Of 2 bits, one alone may be another float (`test_a_row_in_whole_numbers`).
        for first, last in ((0, 9), (3, 16), (0, 8), (8, 16), (11, 13 if bits == 2 else 12)):
            assert torch.equal(product(x[first:last].contiguous(), packed), whole[first:last])
        if product is on_host:
            assert torch.equal(on_host(x, packed, 1), whole)


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize("scaled", [False, True])
def test_more_rows_of_three_columns_each(product: Product, scaled: bool) -> None:
    tensor = stored(35, 1152, 4, 128, scaled=scaled)
    packed = prepare(tensor)
    for x in (inputs(11, 1152), inputs(9, 1152).bfloat16()) if scaled else (inputs(11, 1152),):
        whole = product(x, packed)
        checked(whole, x, tensor)
        for m in (1, 8, 10):
            assert torch.equal(product(x[:m], packed), whole[:m])
        if product is on_host:
            assert torch.equal(on_host(x, packed, 1), whole)


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [128, 64, 32])
def test_sums_are_the_same_however_many_tiles_a_block_has(product: Product, bits: int, group: int) -> None:
    """On the host: one, two and (with one scale a step) four."""
    for dtype in (torch.float16, torch.float32):
        tensor = stored(61, 1152, bits, group, dtype=dtype)
        for x in (inputs(2, 1152), inputs(4, 1152).bfloat16()):
            whole = product(x, prepare(tensor))
            for n in (7, 32):
                part = replace(tensor, codes=tensor.codes[:n], scale=tensor.scale[:n], zero=tensor.zero[:n])
                assert torch.equal(product(x, prepare(part)), whole[:, :n])


ALONE = [(33, 352, 352), (5, 1152, 384), (35, 8 * 128 * 3 + 256, 128), (50, 8 * 128 * 9 + 128, 128)]
"""(N, K, group), groups of whole steps: fewer steps than warps, more than a ring or a product holds."""


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_alone(product: Product, bits: int) -> None:
    """It has blocks of its own. It is the same as beside others but with 2 bits, where it may differ, however much room there is."""
    for n, k, group in ALONE:
        for dtype in (torch.float16, torch.float32):
            tensor, x = stored(n, k, bits, group, dtype=dtype), inputs(3, k).bfloat16()
            packed = prepare(tensor)
            beside, alone = product(x, packed), torch.cat([product(row[None], packed) for row in x])
            checked(alone, x, tensor)
            assert bits == 2 or torch.equal(alone, beside)
            if product is on_host:
                # Without the room for two teams: of 4 bits by blocks of a tile, of 2 with shorter rings; and by blocks of more rows.
                for room, want in (((100 if bits == 2 else 76) << 10, alone), (1, beside)):
                    assert torch.equal(on_host(x[1:2].contiguous(), packed, room), want[1:2])


@pytest.mark.parametrize("product", PLACES)
def test_a_row_in_whole_numbers(product: Product) -> None:
    """Of 2 bits. x is off by up to 2^-23 of the power of two above the largest of its step, however far apart its numbers are; what is not
    finite makes all of out NaN. Beside others, a row is within its own bound: so far apart may both be."""
    for n, k, group in (*ALONE, (18, 28672, 128)):
        tensor, x = stored(n, k, 2, group), inputs(1, k).bfloat16()
        packed = prepare(tensor)
        x[0, 1::7] *= 2.0**18
        x[0, :128] *= 2.0**-90
        want, size = exact(x, tensor, 128)
        steps = pad(x, (0, -k % 128)).double().view(-1, 128).abs().amax(1)
        off = 2.0**-23 * torch.exp2(torch.floor(torch.log2(steps)) + 1).repeat_interleave(128)[:k]
        bound = (2 * 16 + 4 * k // 32 + 8) * U * size + off @ tensor.dequantize().double().abs().T
        bound = bound + 2.0**-8 * (want.abs() + bound)
        got, beside = product(x, packed), product(x.expand(2, k).contiguous(), packed)[:1]
        assert ((got.double() - want).abs() <= bound).all()
        checked(beside, x, tensor)
        x[0, k // 2] = torch.inf
        assert product(x, packed).isnan().all()


@pytest.mark.parametrize("product", PLACES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_zero_leave_nothing(product: Product, bits: int) -> None:
    """What operands have besides codes is taken off without a remainder."""
    for group in (32, 1088):
        tensor = stored(40, 1088, bits, group)
        tensor = replace(tensor, codes=torch.zeros_like(tensor.codes), zero=torch.zeros_like(tensor.zero))
        for dtype in (torch.bfloat16, torch.float32):
            for m in (1, 3, 13):
                assert not product(inputs(m, 1088, dtype), prepare(tensor)).any()


@pytest.mark.parametrize("product", PLACES)
def test_an_input_scale_divides_in_float32(product: Product) -> None:
    """In bfloat16 the quotients would be off by 2^-9."""
    tensor = stored(20, 256, 4, 64, scaled=True)
    for m in (1, 5):
        x = inputs(m, 256, torch.bfloat16)
        packed = prepare(tensor)
        divided = given_to(x, packed.input_scale)
        assert torch.equal(product(x, packed), product(divided, replace(packed, input_scale=None)).bfloat16())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_made_again_on_the_host(bits: int, dtype: torch.dtype) -> None:
    host_is_built()
    for n, k, group in CASES:
        packed = prepare(stored(n, k, bits, group))
        out = torch.full((n, k), torch.nan, dtype=dtype)
        numbers = (n, k, packed.groups, bits, 1, int(dtype is torch.bfloat16))
        native.call("wq_fragments", "bitgrid_wq_values", packed.words, packed.ranges, out, *numbers)
        check_weight(out, packed)


def check_weight(got: Tensor, packed: Fragments) -> None:
    want = packed.values(torch.float64)
    scale, zero = packed.ranges.double().abs().unbind(-1)
    # A sum is rounded, of exact products; and the result.
    bound = (
        2 * U * float((2**packed.bits * scale + zero * scale).max())
        + (0 if got.dtype is torch.float32 else torch.finfo(got.dtype).eps) * want.abs()
    )
    assert ((got.double().cpu() - want).abs() <= bound).all()


def test_what_the_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codes of 5 bits; the packed layout has 2, 3, 4, 8: use backend=reference"):
        prepare(stored(4, 96, 5, 32))
    with pytest.raises(ValueError, match=r"groups of 48 columns of 96"):
        prepare(stored(4, 96, 4, 48))
    with pytest.raises(ValueError, match=r"laid out for other backends; use what this one's prepare returns"):
        twin.wq_gemv(inputs(1, 96), tiles_of_eight(stored(4, 96, 4, 32)))


@pytest.mark.skipif(on_cuda.compiler() is None, reason="there is no nvcc")
@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling for two GPUs takes a minute")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_what_the_compiler_makes_of_it(capability: tuple[int, int], tmp_path: Path) -> None:
    """Nothing is spilled; codes are copied 16 bytes at a time; products run on tensor cores."""
    cubin = tmp_path / "wq_gemv.cubin"
    nvcc = on_cuda.compiler()
    assert nvcc is not None
    command = [nvcc, "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", on_cuda.target(capability), str(on_cuda.SOURCES / "wq_gemv.cu")]
    said = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=True).stderr
    assert said.count("bytes stack frame") > 20
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", said)) == {"0"}
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= 128
    disassembler = pytest.importorskip("triton.knobs").nvidia.cuobjdump.path
    text = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for function in text.split("Function : ")[1:]:
        if re.search("product|single|balanced", function.splitlines()[0]):
            assert re.search(r"LDGSTS\.E\.BYPASS(?:\.LTC128B)?\.128", function)
            assert ("IMMA.16832.U8.S8" if "Whole" in function.splitlines()[0] else "HMMA.16816.F32.BF16") in function
            assert not re.search(r"\b(?:LDL|STL)\b", function)


@needs_device
@pytest.mark.parametrize("bits", BITS)
def test_the_weight_is_made_again_on_a_device(bits: int) -> None:
    for n, k, group in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            packed = prepare(stored(n, k, bits, group))
            check_weight(twin.values(moved(packed, "cuda"), dtype), packed)
    tensor, x = stored(5, 96, bits, 32), inputs(40, 96)
    check(with_many_rows(x.cuda(), moved(prepare(tensor), "cuda"), twin).cpu(), x, tensor)


@needs_device
@pytest.mark.parametrize("bits", BITS)
def test_sizes_of_real_models_on_a_device(bits: int) -> None:
    """More tiles than blocks that fit at once, every number of tiles a block takes, and rows that go through shared memory in parts."""
    shapes = [(4096, 4096, 128), (11008, 512, 64), (8200, 1024, 128), (33000, 256, 128), (512, 28672, 128), (256, 11008, 11008)]
    for n, k, group in (*shapes, (4100, 1024, 32), (8200, 512, 32), (4096, 320, 64)):
        tensor = large(n, k, bits, group)
        packed = twin.prepare(tensor)
        weight = tensor.dequantize().double()
        for m in (1, 2, 8, 11, 16):
            x = torch.randn(m, k, device="cuda").bfloat16()
            want = x.double() @ weight.T
            got = twin.wq_gemv(x, packed)
            assert float((got.double() - want).norm() / want.norm()) <= 2.0**-8
            assert torch.equal(got, twin.wq_gemv(x, packed))
            assert torch.equal(got, torch.ops.bitgrid.wq_gemv(x, *operands(packed)))
            # Rows alone, with 2 bits, may be other floats.
            parts = [(i, min(i + 5, m)) for i in range(0, m, 5) if m - i > 1 or bits != 2]
            for i, end in parts:
                assert torch.equal(got[i:end], twin.wq_gemv(x[i:end].contiguous(), packed))
        x = torch.randn(11, k, device="cuda")
        got, want = twin.wq_gemv(x, packed), x.double() @ weight.T
        assert float((got.double() - want).norm() / want.norm()) <= 1e-5
        assert torch.equal(got[:3], twin.wq_gemv(x[:3].contiguous(), packed))
        assert kernel("wq_gemv", device="cuda").backend == "cuda"


@needs_device
@pytest.mark.parametrize(("n", "m"), [(1024, 2), (4096, 16)])
def test_a_graph_of_products_that_feed_each_other(n: int, m: int) -> None:
    """Each reads what the one before it has just written, and may begin before that has ended."""
    layers = [twin.prepare(large(n, n, 4, 128)) for _ in range(12)]
    x, outs = torch.randn(m, n, device="cuda").bfloat16(), [torch.empty(m, n, dtype=torch.bfloat16, device="cuda") for _ in layers]

    def run() -> None:
        for given, layer, out in zip([x, *outs], layers, outs, strict=False):
            twin.wq_gemv(given, layer, out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(20):
        x.copy_(torch.randn(m, n, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
        graph.replay()
        got = [out.clone() for out in outs]
        for given, layer, out in zip([x, *got], layers, got, strict=False):
            assert torch.equal(twin.wq_gemv(given.clone(), layer), out)
            torch.cuda.synchronize()


def large(n: int, k: int, bits: int, group: int) -> AffineTensor:
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scale = ((torch.rand(n, k // group, device="cuda") + 0.5) / 2**bits / k**0.5).half()
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, device="cuda")
    return AffineTensor(codes, scale, zero, bits, ZeroKind.CODE)
