"""Products with tables in CUDA C++: their phases on the host, one thread after another, against float64; the compiler's report; and,
where there is a GPU, the kernels themselves. Tolerances: test_table_gemv.py."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels import binary_gemv, kernel, lut_gemv, native, on_cuda, row_lut_gemv
from quant.kernels.binary_gemv import cpu, digits
from quant.kernels.library import operands
from quant.kernels.lut_gemv import cuda as lut_cuda
from quant.kernels.lut_gemv import fragments
from quant.kernels.products import written_to
from quant.kernels.row_lut_gemv import cuda as row_cuda
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from tests.quant.products_affine import U_BFLOAT16, U, inputs
from tests.quant.products_tables import PREPARE as OF_OTHERS
from tests.quant.products_tables import cases, codebook, exact, row_codebook, signs, tables_of_sizes
from tests.quant.products_tables import check as held_to

LIMITS = {90: 232448, 86: 101376}
"""Compute capability ▸ bytes of shared memory a block may have. NVIDIA, CUDA C++ Programming Guide, table of compute capabilities."""
SOURCES = {op: f"{op}_lanes" for op in ("lut_gemv", "row_lut_gemv", "binary_gemv")}
PREPARE = OF_OTHERS | {"lut_gemv": fragments.prepare, "binary_gemv": digits.prepare}
CLUSTERS = [op for op in SOURCES if op != "row_lut_gemv"]
"""Those of which a row's sums are spread over clusters."""
GPU = pytest.mark.gpu("nvcc")


def on_the_host(operation: str, x: Tensor, packed: Any, clusters: int = 2, ranks: int = 8, limit: int = LIMITS[90]) -> Tensor:
    """What the kernel writes whose GPU runs as many clusters of as many blocks at once. Skips the test where that cannot be built."""
    reason = native.unavailable(SOURCES[operation], torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    out = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype)
    assert written_to(x, packed.shape, out) is out
    if isinstance(packed, row_lut_gemv.Packed):
        native.call("row_lut_gemv_lanes", "bitgrid_row_lut_lanes", *row_cuda.arguments(x, packed, out))
        return out
    scale = 0 if packed.input_scale is None else packed.input_scale
    last = (*packed.shape, x.shape[0], int(x.dtype is torch.bfloat16), clusters, ranks, limit)
    if isinstance(packed, binary_gemv.Packed):
        counts = (*last[:2], packed.block, *last[2:])
        weight = (packed.words, packed.tables, packed.salient, packed.largest)
        native.call("binary_gemv_lanes", "bitgrid_binary_lanes", *weight, x, scale, out, *counts)
        return out
    parts, kept = lut_cuda.arguments(packed)
    tables = [torch.tensor([v.data_ptr() if isinstance(v, Tensor) else v for v in some]) for some in (parts, kept)]
    native.call("lut_gemv_lanes", "bitgrid_lut_lanes", *tables, x, scale, out, len(packed.parts), *last)
    return out


def cut(x: Tensor, tensor: Any) -> Tensor | float:
    """What operands are off by, for each sum."""
    if isinstance(tensor, CodebookTensor):
        return cut_of_codebook(x, tensor)
    return cut_of_signs(x, tensor) if isinstance(tensor, BinaryTensor) else 0.0


def cut_of_signs(x: Tensor, tensor: BinaryTensor) -> Tensor:
    """[M, N]: digits of a value that are left out are half of the last one's unit and 2^-8 of it, of 2^-15 or 2^-23 of the row's largest
    (2^31 - 2^16: 2^-15 more); an x is rounded to 2^-26 of the largest at most."""
    given = x.double().abs() if tensor.input_scale is None else x.double().abs() / tensor.input_scale.double()
    largest = binary_gemv.prepare(tensor).largest.flatten()[: tensor.shape[0]].double()
    weight = replace(tensor, input_scale=None).dequantize().double().abs()
    last = 2.0**-15 if x.dtype is torch.bfloat16 else 2.0**-23
    return (0.5 + 2.0**-7) * last * given.sum(1, keepdim=True) * largest + 2.0**-27 * given.amax(1, keepdim=True) * weight.sum(1)


def cut_of_codebook(x: Tensor, tensor: CodebookTensor) -> Tensor:
    """[M, 1]: what lut_gemv_cuda.h says that tables' terms and whole numbers are off by, of a part all columns beside its largest x W, and
    with 4 bits its largest x times a term of more than one bit; and, where x is float32, a rounding of each of a column's 2^(bits - 1)
    terms, which count twice, and of its first value."""
    off = torch.zeros(len(x), 1, dtype=torch.float64)
    given = x.double().abs() if tensor.input_scale is None else x.double().abs() / tensor.input_scale.double()
    half = x.dtype is torch.bfloat16
    widths = tensor.widths.clamp(min=2)
    for bits in widths.unique().tolist():
        terms = given[:, widths == bits] * tensor.tables[widths == bits].double().abs().amax(1)
        off += (2.0 ** (bits - 24) + (0 if half else (2.0**bits + 1) * 2.0**-24)) * terms.sum(1, keepdim=True)
        off += terms.shape[1] * (2.0 ** (bits - 1) + 0.5) * 2.0 ** (-21 if half else -29) * terms.amax(1, keepdim=True)
        if half and bits == fragments.NARROW_BITS:
            crossed = fragments.terms_of(tensor.tables[widths == bits].float())[:, bits:].double().abs().amax(1)
            steps = (2**bits - 1 - bits) * 2.0**-14 + (bits + 0.5) * 2.0**-18
            off += terms.shape[1] * steps * (given[:, widths == bits] * crossed).amax(1, keepdim=True)
    return off


def check(got: Tensor, x: Tensor, tensor: Any) -> None:
    held_to(got, x, tensor, cut(x, tensor))


def taken(operation: str) -> list[Any]:
    """Tensors for the kernel that has phases: signs in blocks of whole units."""
    some = cases(operation)
    if operation != "binary_gemv":
        return some
    some = [t for t in some if t.block_size % binary_gemv.UNIT == 0]
    return [*some, signs(21, 900, 256, True, torch.float32, True), signs(17, 512, 512, False)]


def large(operation: str, n: int, k: int, widths: tuple[int, ...], kept: int = 0) -> Any:
    if operation == "row_lut_gemv":
        return row_codebook(n, k, widths[-1])
    return codebook(n, k, widths, kept) if operation == "lut_gemv" else signs(n, k, 128)


@pytest.mark.parametrize("operation", SOURCES)
def test_error_is_that_of_rounding(operation: str) -> None:
    for tensor in taken(operation):
        packed = PREPARE[operation](tensor)
        for x in (inputs(1, tensor.shape[1]), inputs(2, tensor.shape[1]), inputs(5, tensor.shape[1], torch.bfloat16)):
            check(on_the_host(operation, x, packed), x, tensor)


@pytest.mark.parametrize("operation", SOURCES)
def test_rows_of_x_stand_alone(operation: str) -> None:
    """Bit for bit, where tables of more rows of x have to be made in more turns."""
    tensor = large(operation, 70, 1500, (2, 3), 2)
    packed, x = PREPARE[operation](tensor), inputs(8, 1500)
    for of in ({"ranks": 1, "limit": LIMITS[86]}, {})[operation == "row_lut_gemv" :]:
        whole = on_the_host(operation, x, packed, **of)
        check(whole, x, tensor)
        for m in (1, 2, 3):
            assert torch.equal(on_the_host(operation, x[:m], packed, **of), whole[:m])


def test_signs_of_many_columns() -> None:
    """A warp's units in more turns than one, whole and not, of shares of which the last is short; an odd number of tiles."""
    tensor, x = signs(17, 7100, 128), inputs(5, 7100)
    packed = digits.prepare(tensor)
    for ranks in (1, 4, 5):
        whole = on_the_host("binary_gemv", x, packed, ranks=ranks)
        check(whole, x, tensor)
        for m in (1, 3):
            assert torch.equal(on_the_host("binary_gemv", x[:m], packed, ranks=ranks), whole[:m])


@pytest.mark.parametrize("operation", CLUSTERS)
def test_more_rows_than_one_wave(operation: str) -> None:
    tensor: Any = codebook(1100, 40, (4,)) if operation == "lut_gemv" else signs(1100, 40, 128)
    x = inputs(1, 40)
    check(on_the_host(operation, x, PREPARE[operation](tensor), clusters=1, ranks=3), x, tensor)


@pytest.mark.parametrize("operation", CLUSTERS)
def test_the_number_of_clusters_changes_nothing(operation: str) -> None:
    """Clusters of the most rows, or of one tile each: what a row comes to is the same bit for bit."""
    tensor: Any = codebook(15 * 20 * 32 - 7, 72, (3,)) if operation == "lut_gemv" else signs(9600 - 7, 72, 128)
    packed, x = PREPARE[operation](tensor), inputs(1, 72)
    got = on_the_host(operation, x, packed, clusters=15)
    check(got, x, tensor)
    assert torch.equal(got, on_the_host(operation, x, packed, clusters=300))


@pytest.mark.parametrize(("m", "n", "k", "block", "ranks"), [(2, 200, 7100, 128, 1), (2, 600, 4000, 256, 8), (3, 40, 1500, 384, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rings_change_nothing(m: int, n: int, k: int, block: int, ranks: int, dtype: torch.dtype) -> None:
    """Of chunks whole and not, pairs more and fewer than a ring holds: bit for bit what registers give, where rings have no room."""
    tensor, x, room = signs(n, k, block), inputs(m, k, dtype), 98304 if ranks == 1 else 65536
    got, registers = (on_the_host("binary_gemv", x, digits.prepare(tensor), 1, ranks, limit) for limit in (LIMITS[90], room))
    check(got, x, tensor)
    assert torch.equal(got, registers)


def test_inputs_of_very_different_sizes_and_none() -> None:
    """Of 28 bits of the largest of some columns each x keeps what float32 would, as far as the sum is concerned."""
    tensor = signs(19, 1024, 128)
    packed = digits.prepare(tensor)
    x = inputs(4, 1024)
    x[0, ::7] *= 4000
    x[1], x[2, 500:] = 0, 0
    x[3] *= 2.0**-100
    check(on_the_host("binary_gemv", x, packed), x, tensor)
    x[2, 3] = torch.inf
    got = on_the_host("binary_gemv", x, packed)
    assert got[2].isnan().all()
    assert not got[[0, 1, 3]].isnan().any()


def test_digits_are_those_of_values() -> None:
    """Off by half of 2^-31 of the row's largest, and three roundings; a row with one that is none has none."""
    for tensor in (*cases("binary_gemv"), signs(17, 512, 512, False)):
        plain, packed = binary_gemv.prepare(tensor), digits.prepare(tensor)
        assert torch.equal(digits.salient_of(packed.salient), plain.salient)
        got, want = digits.values_of(packed.tables, packed.largest), plain.tables
        assert ((got - want).double().abs() <= 2.0**-31 * plain.largest[:, None, :, None] + 3 * U * want.abs()).all()
    tensor.scale[3, 0, 1] = torch.nan
    rows = digits.prepare(tensor).values(torch.float32)
    assert rows[3].isnan().all()
    assert not rows[torch.arange(17) != 3].isnan().any()


def test_other_backends_refuse_tables_of_digits() -> None:
    tensor, x = signs(9, 256, 128), inputs(1, 256)
    with pytest.raises(ValueError, match="laid out for other backends"):
        cpu.binary_gemv(x, digits.prepare(tensor))
    with pytest.raises(ValueError, match="laid out for other backends"):
        digits.check(binary_gemv.prepare(tensor))


def test_products_with_bfloat16_are_rounded_to_it_once() -> None:
    """What comes out is the rounding of a number as near as `cut_of_signs` says, far nearer than bfloat16 has any."""
    for tensor in (signs(40, 1500, 128), signs(24, 900, 256, True, torch.float32, True)):
        x = inputs(3, tensor.shape[1], torch.bfloat16)
        got = on_the_host("binary_gemv", x, digits.prepare(tensor))
        want, size, roundings = exact(x, tensor)
        off = roundings * U * size + cut_of_signs(x, tensor)
        assert ((want - off).bfloat16() <= got).all()
        assert (got <= (want + off).bfloat16()).all()


def test_values_of_very_different_sizes() -> None:
    """Of 24 bits of a row's largest value each one keeps what float32 would, as far as the sum is concerned."""
    tensor, x = signs(19, 1024, 128), inputs(2, 1024)
    size = 1000.0 ** torch.arange(-1, 2).repeat(8)[:8]
    tensor = replace(tensor, scale=tensor.scale.float() * size[:, None], mean=None)
    check(on_the_host("binary_gemv", x, digits.prepare(tensor)), x, tensor)
    tensor.scale[5, 2, 1] = torch.inf
    got = on_the_host("binary_gemv", x, digits.prepare(tensor))
    assert got[:, 5].isnan().all()
    assert not got[:, torch.arange(19) != 5].isnan().any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_whole_numbers_come_out_exactly(bits: int) -> None:
    """Each code of each column counts as it should: sums of whole numbers below 2^24 have no roundings to hide an error in, and their
    terms are whole numbers, too."""
    n, k = 2**bits * 5, 700
    g = torch.Generator().manual_seed(bits)
    tables = 16 * torch.randint(-9, 10, (k, 2**bits), generator=g).half()
    codes = (torch.arange(n)[:, None] * torch.randint(1, 99, (k,), generator=g) + torch.randint(99, (k,), generator=g)) % 2**bits
    tensor = CodebookTensor(codes.to(torch.uint8), torch.full((k,), bits), tables, 2.0)
    x = torch.randint(-31, 32, (3, k), generator=g).float()
    want = x.double() @ tensor.dequantize().double().T
    packed = fragments.prepare(tensor)
    for kind in (torch.float32, torch.bfloat16):
        assert torch.equal(on_the_host("lut_gemv", x.to(kind), packed), want.to(kind))
        assert torch.equal(on_the_host("lut_gemv", x[:1].to(kind), packed, ranks=1, limit=LIMITS[86]), want[:1].to(kind))


@pytest.mark.parametrize(("bits", "k"), [(3, 1700), (4, 1500)])
def test_turns_change_nothing(bits: int, k: int) -> None:
    """Where a block has no place for bits of all of its columns times all rows of x."""
    tensor, x = codebook(37, k, (bits,)), inputs(5, k, torch.bfloat16)
    packed = fragments.prepare(tensor)
    for limit in LIMITS.values():
        whole = on_the_host("lut_gemv", x, packed, ranks=1, limit=limit)
        check(whole, x, tensor)
        for m in (1, 2):
            assert torch.equal(on_the_host("lut_gemv", x[:m], packed, ranks=1, limit=limit), whole[:m])
    check(on_the_host("lut_gemv", x.float(), packed, ranks=1), x.float(), tensor)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_product_is_just_below_a_power_of_two(bits: int) -> None:
    """A term that float32 has no number between and one, of each parity, with both signs: not to be rounded up to one bit more."""
    code = torch.arange(2**bits)
    for subset in range(1, 2**bits):
        odd = torch.tensor([(c & subset).bit_count() % 2 == 1 for c in code.tolist()])
        table = torch.where(odd, -1, 1) * (1 - 2.0**-24)
        tensor = CodebookTensor(code.to(torch.uint8)[:, None], torch.full((1,), bits), table.float()[None], 2.0)
        for x in (torch.ones(1, 1), torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)):
            got = on_the_host("lut_gemv", x, fragments.prepare(tensor))
            assert torch.equal(got.bfloat16(), (x.double() * table).bfloat16())


def test_a_call_reads_no_tables() -> None:
    packed = fragments.prepare(codebook(70, 300, (2, 4)))
    for part, bits in zip(packed.parts, (2, 4), strict=True):
        assert part.words.shape == (3, 1, 256 * bits)
        assert part.read == 3 * 1024 * bits + 4 * 256 * (2**bits + 1 + (bits == 4)) + 8 * 150
        assert part.bytes == part.read + 4 * 150 * 2**bits
    assert (packed.read, packed.bytes) == tuple(sum(getattr(p, size) for p in packed.parts) for size in ("read", "bytes"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("widths", [(1, 2), (3,), (4,)])
def test_digits_are_off_by_what_they_may(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """x of very different sizes, tiny, and none; tables too."""
    tensor = tables_of_sizes(widths, dtype)
    packed = fragments.prepare(tensor)
    for kind in (torch.float32, torch.bfloat16):
        x = inputs(5, 390, kind)
        x[0, ::7] *= 4000
        x[1], x[2, 50:] = 0, 0
        x[3] *= 2.0**-60
        got = on_the_host("lut_gemv", x, packed)
        want, size, roundings = exact(x, tensor)
        bound = roundings * U * size + cut_of_codebook(x, tensor)
        if kind is torch.bfloat16:
            bound += U_BFLOAT16 * (want.abs() + bound)
        assert ((got.double() - want).abs() <= bound).all()
        assert (got[1] == 0).all()


def test_inputs_that_are_no_numbers_spoil_their_row_alone() -> None:
    tensor = codebook(70, 300, (2, 4))
    x = inputs(4, 300)
    want = on_the_host("lut_gemv", x, fragments.prepare(tensor))
    x[1, 3], x[2, 7] = torch.inf, torch.nan
    got = on_the_host("lut_gemv", x, fragments.prepare(tensor))
    assert got[1:3].isnan().all()
    assert torch.equal(got[[0, 3]], want[[0, 3]])


def test_words_of_another_layout_are_refused() -> None:
    tensor = codebook(70, 300, (2, 4))
    with pytest.raises(ValueError, match="laid out for other backends"):
        lut_cuda.arguments(lut_gemv.prepare(tensor))
    with pytest.raises(ValueError, match="laid out for other backends"):
        lut_gemv.side_by_side(fragments.prepare(tensor))


@pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling for two GPUs takes a minute")
@pytest.mark.parametrize("operation", sorted(SOURCES))
def test_the_compiler_spills_nothing(operation: str, tmp_path: Path) -> None:
    nvcc = on_cuda.compiler()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    for capability in ((9, 0), (8, 0)):
        command = [nvcc, *on_cuda.FLAGS, on_cuda.target(capability), "-Xptxas", "-v", str(native.SOURCES / f"{operation}.cu")]
        done = subprocess.run([*command, "-o", str(tmp_path / "made.so")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
        assert found
        assert all(f == ("0", "0") for f in found), done.stderr[-3000:]


@GPU
@pytest.mark.parametrize("operation", sorted(SOURCES))
def test_kernel_on_a_gpu(operation: str) -> None:
    backend = kernel(operation, "cuda", "cuda").run
    for tensor in (*cases(operation), large(operation, 2080, 4100, (2, 4), 2)):
        packed: Any = PREPARE[operation](tensor)
        there: Any = moved(packed)
        for x in (inputs(1, tensor.shape[1]), inputs(2, tensor.shape[1]), inputs(7, tensor.shape[1], torch.bfloat16)):
            out = torch.full((x.shape[0], tensor.shape[0]), torch.nan, dtype=x.dtype, device="cuda")
            got = getattr(backend, operation)(x.cuda(), there, out)
            assert got is out
            check(got.cpu(), x, tensor)
            assert torch.equal(getattr(backend, operation)(x[:1].cuda(), there), got[:1])
            check(getattr(torch.ops.bitgrid, operation)(x.cuda(), *operands(there)).cpu(), x, tensor)
        want = (PREPARE if operation == "binary_gemv" else OF_OTHERS)[operation](tensor).values(torch.float32)
        assert torch.equal(backend.values(there).cpu(), want)
        assert torch.equal(backend.values(there, torch.bfloat16).cpu(), want.bfloat16())


@GPU
def test_the_device_says_how_many_clusters_fit() -> None:
    """Of 8 blocks that have a multiprocessor each, where there are clusters."""
    device = torch.device("cuda", torch.cuda.current_device())
    all_there = torch.cuda.get_device_properties(device).multi_processor_count
    for operation in CLUSTERS:
        most = all_there // (8 if torch.cuda.get_device_capability() >= (9, 0) else 1)
        found = torch.zeros(1, dtype=torch.int64)
        entry = f"bitgrid_{operation.removesuffix('_gemv')}_clusters"
        on_cuda.call(operation, entry, torch.empty(0, device=device), found.data_ptr())
        assert 1 <= int(found) <= most


@GPU
@pytest.mark.parametrize("operation", sorted(SOURCES))
def test_a_graph_holds_the_call(operation: str) -> None:
    tensor = large(operation, 96, 512, (2,))
    run, there = getattr(kernel(operation, "cuda", "cuda").run, operation), moved(PREPARE[operation](tensor))
    x, out = inputs(2, 512).cuda(), torch.empty(2, 96, device="cuda")
    run(x, there, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x, there, out)
    x.copy_(inputs(3, 512)[1:])
    graph.replay()
    check(out.cpu(), x.cpu(), tensor)


def moved(packed: Any) -> Any:
    """To the GPU."""
    scale = None if packed.input_scale is None else packed.input_scale.cuda()
    if isinstance(packed, binary_gemv.Packed):
        weight = (t.cuda() for t in (packed.words, packed.tables, packed.salient, packed.largest))
        return binary_gemv.Packed(*weight, scale, packed.shape, packed.block)
    if isinstance(packed, row_lut_gemv.Packed):
        return row_lut_gemv.Packed(packed.words.cuda(), packed.tables.cuda(), scale, packed.shape, packed.bits)
    parts = tuple(lut_gemv.Part(p.words.cuda(), p.values.cuda(), p.columns.cuda(), p.bits) for p in packed.parts)
    kept = packed.apart
    apart = None if kept is None else lut_gemv.Apart(kept.starts.cuda(), kept.columns.cuda(), kept.differences.cuda())
    return lut_gemv.Packed(parts, apart, scale, packed.shape)
