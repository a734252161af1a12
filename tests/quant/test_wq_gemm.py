"""Products with packed codes and tensor cores against float64 on the same codes.

Tolerance: as a whole, twice the error of torch's product in the same type with the weight rounded to it, and an eighth of a unit in the
last place of the result, for the sums; and no output is off by more than 8 u A, A = Σ |x| (|code · scale| + |offset|), u half a unit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.affine import ZeroKind
from quant.kernels import kernel
from quant.kernels.library import operands
from quant.kernels.on_triton import interpreted
from quant.kernels.wq_gemm import BITS, Packed, prepare, reference
from quant.kernels.wq_gemm.triton import SPLITS, Shape, candidates, constants, shape
from quant.tensors.affine import AffineTensor
from tests.quant.products_affine import exact, stored

UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not 1: nothing runs without a GPU")
needs_gpu = pytest.mark.gpu("triton")


def inputs(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def check(got: Tensor, x: Tensor, tensor: AffineTensor) -> None:
    unit = UNITS[x.dtype]
    want, size = exact(x, tensor)
    error = (got.double() - want).abs()
    assert got.dtype == x.dtype
    assert (error <= 8 * unit * size).all(), f"{float((error / size).max() / unit)} units"
    peer = ((x.double() @ tensor.dequantize().to(x.dtype).double().T).to(x.dtype).double() - want).norm()
    assert error.norm() <= 2 * peer + unit / 8 * want.norm(), f"{float(error.norm())}, torch {float(peer)}"


def on(tensor: AffineTensor, device: str) -> AffineTensor:
    moved = {name: value.to(device) for name, value in vars(tensor).items() if isinstance(value, Tensor)}
    return replace(tensor, **moved)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_exact(bits: int) -> None:
    for kind in ZeroKind:
        for n, k, group in ((1, 32, 32), (17, 96, 32), (16, 512, 128), (5, 352, 352), (33, 37, 37)):
            tensor = stored(n, k, bits, group, kind)
            packed = prepare(tensor)
            assert torch.equal(packed.codes(), tensor.codes)
            scale, zero = (t.double().repeat_interleave(group, 1) for t in (tensor.scale, tensor.zero))
            codes = tensor.codes.double()
            want = codes * scale + zero if kind is ZeroKind.MINIMUM else (codes - zero) * scale
            # An offset is a float32; a zero that is a code is exact.
            bound = 2.0**-24 * (2**bits * scale.abs() + (zero if kind is ZeroKind.MINIMUM else zero * scale).abs()) if packed.offsets else 0
            assert ((packed.values(torch.float64) - want).abs() <= bound).all()


def test_bytes_are_those_of_the_codes_and_ranges() -> None:
    for bits in BITS:
        packed = prepare(stored(16, 512, bits, 128))
        assert packed.bytes == 16 * 512 * bits // 8 + 16 * 4 * (2 + 1)
        assert prepare(stored(16, 512, bits, 128, ZeroKind.CONSTANT)).bytes == 16 * 512 * bits // 8 + 16 * 4 * 2


@pytest.mark.parametrize("dtype", UNITS)
def test_reference_takes_every_affine_tensor(dtype: torch.dtype) -> None:
    for kind in ZeroKind:
        tensor = stored(5, 60, 5, 20, kind, torch.float32, True)
        x = inputs(9, 60, dtype)
        check(reference.wq_gemm(x, reference.prepare(tensor)), x, tensor)


CASES = [
    # bits, n, k, group, kind, m, split, operand
    (4, 40, 256, 128, ZeroKind.CONSTANT, 9, 2, False),
    (4, 64, 352, 352, ZeroKind.CODE, 16, 3, False),
    (4, 33, 192, 32, ZeroKind.CODE, 13, 1, False),
    (4, 33, 192, 64, ZeroKind.FLOAT, 17, 2, True),
    (4, 70, 288, 96, ZeroKind.MINIMUM, 9, 3, False),
    (2, 40, 512, 128, ZeroKind.CODE, 9, 2, False),
    (2, 16, 320, 64, ZeroKind.INTEGER, 9, 1, True),
    (3, 40, 512, 128, ZeroKind.CONSTANT, 9, 2, False),
    (3, 20, 320, 32, ZeroKind.CODE, 9, 1, False),
    (3, 20, 288, 96, ZeroKind.CODE, 9, 1, True),
    (8, 40, 256, 128, ZeroKind.CODE, 9, 2, False),
    (8, 20, 96, 32, ZeroKind.MINIMUM, 9, 1, True),
    (8, 20, 37, 37, ZeroKind.CONSTANT, 9, 1, False),
]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_in_the_interpreter(case: tuple[int, int, int, int, ZeroKind, int, int, bool]) -> None:
    bits, n, k, group, kind, m, split, operand = case
    tensor = stored(n, k, bits, group, kind, scaled=bits == 3)
    x = inputs(m, k)
    run = kernel("wq_gemm", "triton").run
    packed = run.prepare(tensor)
    memory = torch.full((m * n + 64,), torch.nan, dtype=x.dtype)
    out = memory[: m * n].view(m, n)
    cut = Shape(64, 16, split, 4, 1, operand)
    assert run.wq_gemm(x, packed, out, cut) is out
    check(out, x, tensor)
    assert memory[m * n :].isnan().all()
    # Counters are zeros again, and rows of x stand alone.
    assert torch.equal(run.wq_gemm(x[: m - 1].contiguous(), packed, None, cut), out[: m - 1])


@needs_interpreter
def test_the_order_of_rows_in_larger_tiles() -> None:
    """Warps and rows of a program only say who does what."""
    tensor = stored(130, 128, 4, 128)
    x, run = inputs(9, 128), kernel("wq_gemm", "triton").run
    packed = run.prepare(tensor)
    made = [run.wq_gemm(x, packed, None, Shape(bn, 16, 1, warps, 1)) for bn, warps in ((64, 4), (128, 4), (128, 8), (256, 8))]
    assert all(torch.equal(m, made[0]) for m in made)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 11008), (8192, 28672), (37, 64)])
def test_every_part_has_work(bits: int, n: int, k: int) -> None:
    for m in (9, 16, 33, 100, 256, 500):
        found = candidates(bits, m, n, k)
        assert found[0] == shape(bits, m, n, k)
        assert len(set(found)) == len(found)
        for cut in found:
            assert cut.split in SPLITS
            assert cut.bm >= min(m, 256 if bits > 3 else 128)
            assert cut.bn % (16 * cut.warps) == 0


def test_where_scales_come_in() -> None:
    def of(bits: int, group: int, operand: bool, kind: ZeroKind = ZeroKind.CONSTANT) -> tuple[str, int, int]:
        made = constants(bits, 384, group, True, kind is ZeroKind.MINIMUM, Shape(64, 16, 1, 4, 1, operand), 1)
        return made["SCALED"], made["WIDTH"], made["SCALES"]

    assert of(4, 128, False) == ("sums", 128, 1)
    assert of(4, 96, False) == ("sums", 32, 1)
    assert of(2, 192, False) == ("sums", 64, 1)
    assert of(2, 96, False) == ("operand", 128, 4)
    assert of(4, 96, True) == ("operand", 128, 4)
    assert of(8, 64, True) == ("operand", 64, 1)
    assert of(4, 384, True) == ("end", 128, 1)
    assert of(4, 384, False, ZeroKind.MINIMUM) == ("sums", 128, 1)


def test_what_the_layout_cannot_hold_is_refused() -> None:
    tensor = stored(4, 96, 4, 32)
    for wrong, message in (
        (stored(4, 96, 5, 32), r"codes of 5 bits; the packed layout has 2, 3, 4, 8: use backend=reference"),
        (replace(tensor, g_idx=torch.arange(96, dtype=torch.uint8) % 3), r"given by g_idx .*: use backend=reference"),
        (stored(4, 96, 4, 48), r"groups of 48 columns of 96; the packed layout takes multiples of 32: use backend=reference"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(wrong)


def test_other_inputs_are_refused() -> None:
    packed = prepare(stored(4, 96, 4, 32))
    for x in (inputs(9, 64), inputs(9, 96)[0], inputs(9, 96, torch.float32), inputs(1, 96)[:0]):
        with pytest.raises(ValueError, match=r"it must be float16 or bfloat16 \[1 or more, 96\]"):
            reference.wq_gemm(x, packed)
    for out in (torch.empty(9, 5).half(), torch.empty(9, 4), torch.empty(4, 9).half().T):
        with pytest.raises(ValueError, match=r"it must be contiguous \(9, 4\), torch.float16"):
            reference.wq_gemm(inputs(9, 96), packed, out)


def test_the_operator_is_the_product() -> None:
    x = inputs(9, 96)
    for tensor in (stored(5, 96, 4, 96, ZeroKind.MINIMUM), stored(5, 96, 8, 32, ZeroKind.CONSTANT)):
        packed: Packed = prepare(tensor)
        check(torch.ops.bitgrid.wq_gemm(x, *operands(packed)), x, tensor)


@needs_gpu
@pytest.mark.parametrize(("bits", "dtype"), [*((bits, torch.bfloat16) for bits in BITS), (4, torch.float16)])
def test_products_on_a_gpu(bits: int, dtype: torch.dtype) -> None:
    """Poisoned outputs, odd shapes, every zero and width of groups; twice, with the same bits. (`bench.wq_gemm` checks all candidates.)"""
    run = kernel("wq_gemm", "triton", "cuda").run
    kinds = list(zip([32, 64, 96, 128, 0], ZeroKind, strict=True))
    for m, n, k, some in ((9, 130, 1152, kinds), (65, 257, 1152, kinds[1::3]), (300, 129, 2304, kinds[1:4:2])):
        for group, kind in some:
            tensor = stored(n, k, bits, group or k, kind)
            x = inputs(m, k, dtype)
            packed = run.prepare(on(tensor, "cuda"))
            given = x.cuda()
            out = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
            run.wq_gemm(given, packed, out)
            check(out.cpu(), x, tensor)
            assert torch.equal(run.wq_gemm(given, packed), out)


@needs_gpu
def test_a_graph_holds_a_call() -> None:
    run = kernel("wq_gemm", "triton", "cuda").run
    tensor, x = stored(256, 2048, 4, 128), inputs(16, 2048)
    packed, given = run.prepare(on(tensor, "cuda")), x.cuda()
    want = run.wq_gemm(given, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run.wq_gemm(given, packed)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)
