"""Triton kernels in Triton's interpreter, against their references. What the compiler makes of them: test_triton_compiled.py.

The interpreter multiplies no bfloat16 and finds no race; shapes are small, because a step of a program takes milliseconds in it.
"""

from __future__ import annotations

from importlib.metadata import version
from math import isfinite, isnan
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.grids import GRIDS
from quant.hadamard import hadamard_matrix, small_factor
from quant.kernels import TABLE, kernel, recorded
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.int8_linear import Packed
from quant.kernels.on_triton import interpreted
from quant.kernels.wq_gemv import BITS, prepare
from quant.statistics import HessianSum
from tests.quant import plain_loop
from tests.quant import test_table_gemv as table_gemv
from tests.quant.products_affine import check, inputs, stored
from tests.quant.test_fake_quantize import ODD, agree
from tests.quant.test_gptq_block import FOUND, problem, ranges_are_found, rows_need_no_others

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not 1: nothing runs without a GPU")


def run(operation: str) -> object:
    return kernel(operation, "triton").run


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


@pytest.mark.parametrize("name", sorted(op for op, row in TABLE.items() if "triton" in row))
def test_where_it_is_chosen(name: str) -> None:
    assert kernel(name).backend != "triton"
    assert kernel(name, "triton").backend == "triton"


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_equals_the_plain_loop(grid: str, dtype: torch.dtype) -> None:
    """Bit for bit: neither multiplies and adds at once, and rows share nothing."""
    w, upper, affine, group = problem(37, 32, grid, 3, dtype)
    want = kernel("gptq_block", "reference").run.solve_block(w, upper, affine, group)
    out = plain_loop.poisoned(w)
    got = kernel("gptq_block", "triton").run.solve_block(w, upper, affine, group, out)
    assert got is out
    for name in ("codes", "values", "errors"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("grid", ["g_asym", "kivi"])
def test_stacked_configurations_are_solved_as_apart(grid: str) -> None:
    rows_need_no_others(kernel("gptq_block", "triton").run.solve_block, grid, (8, 16, 4), columns=16, rows=(5, 6, 7))


@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize("grids", [("g_asym", "g_sym", "omni", "q_sym"), FOUND[2]], ids=lambda grids: grids[-1])
def test_ranges_of_a_block_are_found_in_the_launch(grids: tuple[str, ...]) -> None:
    def solve(block: Tensor, *given: Any) -> Any:
        backend = "reference" if given[-1] is None else "triton"
        return kernel("gptq_block", backend).run.solve_block(block, *given)

    ranges_are_found(solve, grids, columns=8, smallest=2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), [(13, 352, 32), (3, 256, 256), (8, 96, 96)])
def test_product_with_packed_codes(bits: int, n: int, k: int, group: int) -> None:
    tensor = stored(n, k, bits, group, scaled=k == 96)
    for x in (inputs(2, k), inputs(1, k, torch.bfloat16)):
        out = torch.full((x.shape[0], n), torch.nan, dtype=x.dtype)
        check(kernel("wq_gemv", "triton").run.wq_gemv(x, prepare(tensor), out), x, tensor)


@pytest.mark.parametrize("operation", table_gemv.OPERATIONS)
def test_products_with_tables(operation: str) -> None:
    for tensor in table_gemv.cases(operation):
        if tensor.shape[1] > 256:
            continue
        for x in (inputs(2, tensor.shape[1]), inputs(1, tensor.shape[1], torch.bfloat16)):
            out = torch.full((x.shape[0], tensor.shape[0]), torch.nan, dtype=x.dtype)
            got = getattr(kernel(operation, "triton").run, operation)(x, table_gemv.PREPARE[operation](tensor), out)
            table_gemv.check(got, x, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("k", [5, 32, 40])
def test_hessian_is_the_sum_of_outer_products(dtype: torch.dtype, k: int) -> None:
    """Sums of n products in float32 are off by n u Σ |x| |xᵀ| at most, u = 2^-24, in any order."""
    syrk = kernel("hessian_syrk", "triton").run
    x = torch.randn(2, 37, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    start = torch.randn(k, k, generator=torch.Generator().manual_seed(1))
    start = start + start.T
    total = start.clone()
    syrk.add(total, x)
    got = syrk.finished(total)
    rows = x.double().reshape(-1, k)
    bound = (rows.shape[0] + 3) * 2.0**-24 * (rows.abs().T @ rows.abs() + start.double().abs())
    assert torch.equal(got, got.T)
    assert ((got.double() - (rows.T @ rows + start.double())).abs() <= bound).all()
    apart = start.clone()
    for sequence in x:
        syrk.add(apart, sequence[None])
    assert torch.equal(syrk.finished(apart), got)


def test_partial_sums_are_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than a partial sum has, in two sequences, of ones after a 2^15: beside its square steps of 16 tokens are lost, half of a
    float32's unit being 64, and 128 tokens that are summed from zero are not."""
    monkeypatch.setattr("quant.kernels.hessian_syrk.triton.PROMOTE", 128)
    x = torch.ones(2, 300, 4, dtype=torch.float16)
    x[0, 0] = 2.0**15
    total = torch.zeros(4, 4)
    kernel("hessian_syrk", "triton").run.add(total, x)
    # Lost are those beside the square, and the 44 at the end of each sequence.
    want = 2.0**30 + 128 * (2 + 1)
    assert torch.equal(total.tril(), torch.full((4, 4), want).tril())
    total = torch.zeros(4, 4)
    kernel("hessian_syrk", "triton").run.add(total, torch.ones(2, 300, 4, dtype=torch.float16))
    assert torch.equal(total.tril(), torch.full((4, 4), 600.0).tril())


@pytest.mark.parametrize("n", [1, 2, 16, 256, 12, 40, 172 * 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_hadamard_transform(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(67 if n < 300 else 3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    turned = n % 4 == 0 and n & (n - 1) > 0
    got = kernel("hadamard", "triton").run.transform(x, n**-0.5, turned)
    want = kernel("hadamard", "reference").run.transform(x, n**-0.5, turned)
    assert got.dtype == dtype
    # The same sums in another order: for n = m 2^k m + k roundings of the sum of all |x| at most, in float32 or wider, and the result's.
    unit = {torch.float64: 2.0**-53}.get(dtype, 2.0**-24)
    h = hadamard_matrix(n)
    exact = x.double() @ (h.T if turned else h)
    m = small_factor(n)
    assert m is not None
    bound = (m + n.bit_length()) * unit * x.double().abs().sum(1, keepdim=True) + torch.finfo(dtype).eps * exact.abs()
    assert ((got.double() - exact).abs() <= bound).all()
    assert ((want.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("n", "m"), [(11008, 172), (13824, 108), (14336, 28), (28672, 28)])
def test_hadamard_transform_of_models_widths(n: int, m: int) -> None:
    """Whole numbers, so that sums in any order are exact: the matrix of order m along the slow index, Sylvester's along the other."""
    x = torch.randint(-3, 4, (1, n), generator=torch.Generator().manual_seed(n)).float()
    by, along = (hadamard_matrix(order) * order**0.5 for order in (m, n // m))
    want = by.T.round() @ x.double().view(m, -1) @ along.round()
    for backend in ("triton", "reference"):
        got = kernel("hadamard", backend).run.transform(x)
        assert torch.equal(got.double().view(m, -1), want), backend
    codes, plain = kernel("hadamard", "triton").run.encode(x, 8, True), kernel("fake_quantize", "reference").run.encode(got, 8, True)
    assert torch.equal(codes.codes, plain.codes)
    assert torch.equal(codes.scale, plain.scale)


@pytest.mark.parametrize("n", [64, 96])
def test_longer_rows_are_transformed_in_parts(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.kernels.hadamard import triton

    monkeypatch.setattr(triton, "MOST", 8)
    monkeypatch.setattr(triton, "MOST_PRODUCT", 16)
    x = torch.randint(-9, 9, (5, n), generator=torch.Generator().manual_seed(0)).half()
    with recorded() as chosen:
        assert torch.equal(triton.transform(x, 0.25), kernel("hadamard", "reference").run.transform(x, 0.25))
    assert chosen == {"hadamard": ["reference"]}  # asked for here, and nowhere in the kernel


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a row of NaN has no range, and its values no codes
@pytest.mark.parametrize(("n", "dtype"), [(2, torch.float32), (64, torch.float16), (24, torch.float16), (172, torch.float32)])
def test_codes_of_transformed_rows(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the transform gives, by the reference, bit for bit; also where a row is in no program as a whole."""
    from quant.kernels.hadamard import triton

    x = (torch.randn(5, n, generator=torch.Generator().manual_seed(n)) * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    x[1], x[2, 0] = 0, torch.nan
    given = (8, n % 3 > 0, 0.9, n**-0.5, True)
    want = kernel("fake_quantize", "reference").run.encode(triton.transform(x, *given[3:]), *given[:3])
    got = [triton.encode(x, *given)]
    monkeypatch.setattr(triton, "MOST", 0)
    with recorded() as chosen:
        got.append(triton.encode(x, *given) if n & (n - 1) else got[0])
    assert ("fake_quantize" in chosen) is (n & (n - 1) > 0)
    numbers = torch.arange(5) != 2
    for made in got:
        assert made.scale.isnan()[:, 0].tolist() == (~numbers).tolist()
        assert all(torch.equal(getattr(made, part)[numbers], getattr(want, part)[numbers]) for part in ("codes", "scale", "zero"))
        assert made.sums is None or torch.equal(made.sums, made.codes.sum(1, dtype=torch.int32))


def test_products_that_torch_makes_are_recorded() -> None:
    x = torch.randn(2, 24, dtype=torch.float64)
    with recorded() as chosen:
        kernel("hadamard", "triton").run.transform(x)
    assert chosen == {"hadamard": ["triton", "reference"]}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("vocabulary", [7, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_log_probabilities_of_tokens(vocabulary: int, dtype: torch.dtype, backend: str) -> None:
    g = torch.Generator().manual_seed(vocabulary)
    logits = (8 * torch.randn(3, 4, vocabulary + 1, generator=g)).to(dtype)[:, :3, :vocabulary]
    logits[0, 0, : vocabulary // 2 + 1] = -torch.inf
    logits[1, 1, 0] = torch.nan
    logits[1, 2, 1] = torch.inf
    tokens = torch.randint(vocabulary // 2 + 1, vocabulary, (3, 3), generator=g)
    got = kernel("token_log_probs", backend).run.token_log_probs(logits, tokens)
    assert got.dtype is torch.float32
    want = torch.log_softmax(logits.double(), -1).gather(-1, tokens[..., None])[..., 0]
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().sum() == 2
    # A sum of V exponentials, each off by 2 units at most, its logarithm, and two differences of numbers below 64.
    bound = 2.0**-24 * (vocabulary + 8) + 4 * 64 * 2.0**-24
    assert torch.allclose(got.double(), want, rtol=0, atol=bound, equal_nan=True)


def test_tokens_outside_the_vocabulary_are_not_read() -> None:
    made = kernel("token_log_probs", "triton").run.token_log_probs(torch.zeros(4, 8)[:, :5], torch.tensor([0, 5, -1, 4]))
    assert made.isnan().tolist() == [False, True, True, False]


def test_statistics_by_the_kernel_are_those_of_the_reference() -> None:
    x = torch.randint(-3, 4, (4, 9, 33), generator=torch.Generator().manual_seed(0)).to(torch.float16)
    plain, ours = HessianSum(33), HessianSum(33)
    ours._syrk = run("hessian_syrk")
    for part in (x[:1], x[1:]):
        plain.update(part)
        ours.update(part)
    assert torch.equal(plain.value(), ours.value())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "bits", "clip", "block"), [(1, 8, 1.0, 64), (40, 4, 0.9, 64), (64, 8, 1.0, 64), (4500, 8, 1.0, 1024)])
def test_rows_on_grids_of_their_own(n: int, bits: int, clip: float, block: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In registers as a whole, and longer."""
    monkeypatch.setattr("quant.kernels.fake_quantize.triton.BLOCK", block)
    x = torch.randn(9, n, generator=torch.Generator().manual_seed(n)) * torch.logspace(-9, 9, 9)[:, None]
    agree(x, bits, symmetric, clip, "triton")
    agree(x[:5].half(), bits, symmetric, clip, "triton")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # what is not a number has no code
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_without_a_range(symmetric: bool) -> None:
    # Without infinities: the interpreter warns of what it does not compute with. Before Triton 3.9 it fails with NumPy 2 where a sum is
    # none of int32, as is that of codes that mean nothing.
    takes_nan = tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 9)
    agree(torch.tensor([row for row in ODD if all(isfinite(v) or (isnan(v) and takes_nan) for v in row)]), 8, symmetric, 1.0, "triton")


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("processors", [1, 5])
def test_programs_that_stay_make_every_tile_once(processors: int, descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of tiles than are gone through together, the last of them fewer."""
    from quant.kernels.int8_linear import triton

    monkeypatch.setattr(triton, "_device", lambda device: ((9, 0), processors))
    monkeypatch.setattr(triton, "GROUP", 2)
    g = torch.Generator().manual_seed(0)
    codes, packed_codes = (torch.randint(-128, 128, (n, 64), generator=g).to(torch.int8) for n in (70, 90))
    ones, rows = torch.ones(90), RowCodes(codes, torch.ones(70, 1), torch.zeros(70, 1))
    packed, out = Packed(packed_codes, ones, None, ones, 8, True, 1.0), torch.full((70, 90), torch.nan)
    triton.run(triton.Tile(16, 32, 32, 4, 1, 1.0, gluon=False, descriptors=descriptors, stay=True), codes, rows, packed, out)
    assert torch.equal(out, (codes.long() @ packed_codes.long().T).float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_packed_codes(bits: int, dtype: torch.dtype) -> None:
    packed = prepare(stored(13, 352, bits, 32))
    want = packed.values(torch.float64)
    scale, offset = packed.ranges.double().abs().amax((0, 1, 3))
    bound = 2 * 2.0**-24 * (2**bits * scale + offset) + (want.abs() * 2.0**-11 + 2.0**-25 if dtype is torch.float16 else 0)
    assert ((kernel("wq_gemv", "triton").run.values(packed, dtype).double() - want).abs() <= bound).all()


@pytest.mark.parametrize("operation", table_gemv.OPERATIONS)
def test_weights_of_tables(operation: str) -> None:
    for tensor in table_gemv.cases(operation):
        if tensor.shape[1] <= 256:
            packed = table_gemv.PREPARE[operation](tensor)
            assert torch.equal(kernel(operation, "triton").run.values(packed), packed.values(torch.float32))
