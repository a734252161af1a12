"""Products with codebooks per column, codebooks per row and signs, against float64 on the same values.

Tolerances. `size` is A = Σ |x| |weight|, with what a kept weight stands instead of counted too; u = 2^-24 (2^-8 for bfloat16, in which
only the result is rounded). Between a product and the result lie: with codebooks at most 256 roundings of a part's sum (of 8 words), one
for each of K / 64 parts, and one for each kept weight of a row; with signs 32 of a block's sum and one for each of at most K / 8 blocks;
and 8 of lanes, input scale and result. Each is off by u A at most.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quant.kernels import TABLE, binary_gemv, kernel, lut_gemv, row_lut_gemv
from quant.kernels.library import operands
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from tests.quant.products_affine import U, inputs
from tests.quant.products_tables import PREPARE, cases, check, codebook, exact, row_codebook, signs

OPERATIONS = ("lut_gemv", "row_lut_gemv", "binary_gemv")
FAST = [op for op in OPERATIONS if kernel(op).backend == "cpu"]


@pytest.mark.parametrize("operation", FAST)
def test_error_is_that_of_rounding(operation: str) -> None:
    run = getattr(kernel(operation).run, operation)
    for tensor in cases(operation):
        packed = PREPARE[operation](tensor)
        for m in (1, 3, 8):
            for x in (inputs(m, tensor.shape[1]), inputs(m, tensor.shape[1], torch.bfloat16)):
                out = torch.full((m, tensor.shape[0]), torch.nan, dtype=x.dtype)
                assert run(x, packed, out) is out
                check(out, x, tensor)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_packing_is_exact(operation: str) -> None:
    """Kept weights are stored as differences, which float32 rounds once."""
    for tensor in cases(operation):
        plain = replace(tensor, input_scale=None)
        got, want = PREPARE[operation](tensor).values(torch.float64), plain.dequantize().double()
        kept = isinstance(plain, CodebookTensor) and plain.outliers is not None
        slack = U * (want.abs() + 2 * replace(plain, outliers=None).dequantize().double().abs()) if kept else torch.zeros_like(want)
        assert ((got - want).abs() <= slack).all()


@pytest.mark.parametrize("operation", FAST)
def test_the_weight_is_made_again(operation: str) -> None:
    for tensor in cases(operation):
        packed = PREPARE[operation](tensor)
        for backend in ("cpu", "reference"):
            got = kernel(operation, backend).run.values(packed)
            assert got.dtype is torch.float32
            assert torch.equal(got, packed.values(torch.float32)), backend


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_takes_tensors_as_they_are(operation: str) -> None:
    run = kernel(operation, "reference").run
    wide = {"lut_gemv": [codebook(5, 40, (6, 2), 2)], "binary_gemv": [signs(5, 40, 20)]}.get(operation, [])
    for tensor in (*cases(operation), *wide):
        x = inputs(2, tensor.shape[1])
        want, size, _ = exact(x, tensor)
        got = getattr(run, operation)(x, run.prepare(tensor))
        assert ((got.double() - want).abs() <= U * want.abs() + 2.0**-40 * size).all()
        weight = replace(tensor, input_scale=None).dequantize()
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(run.values(run.prepare(tensor), dtype), weight.to(dtype))


@pytest.mark.parametrize("operation", FAST)
def test_rows_of_the_weight_and_of_x_stand_alone(operation: str) -> None:
    """Bit for bit: a part of the rows of the weight, one row of x beside any others, and any number of threads."""
    run = getattr(kernel(operation).run, operation)
    tensor: Any = some(operation, 1100, 512)
    if operation == "row_lut_gemv":
        part: Any = replace(tensor, codes=tensor.codes[70:], tables=tensor.tables[70:])
    else:
        part = replace(tensor, codes=tensor.codes[70:]) if operation == "lut_gemv" else rows_of(tensor, slice(70, None))
    x = inputs(8, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = run(x, PREPARE[operation](tensor))
        torch.set_num_threads(1)
        assert torch.equal(run(x, PREPARE[operation](tensor)), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(run(x, PREPARE[operation](part)), whole[:, 70:])
    for m in (1, 5):
        assert torch.equal(run(x[:m], PREPARE[operation](tensor)), whole[:m])


def some(operation: str, n: int, k: int) -> Any:
    if operation == "row_lut_gemv":
        return row_codebook(n, k, 3)
    return codebook(n, k, (2, 4)) if operation == "lut_gemv" else signs(n, k, min(128, k // 3))


def rows_of(tensor: BinaryTensor, rows: slice) -> BinaryTensor:
    assert tensor.mean is not None
    flags = (tensor.signs[rows], tensor.second[rows], tensor.split[rows])
    return BinaryTensor(*flags, tensor.salient, tensor.scale[rows], tensor.mean[rows], tensor.block_size)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bytes_are_those_of_codes_and_tables(operation: str) -> None:
    if operation == "binary_gemv":
        assert binary_gemv.prepare(signs(16, 256, 128)).bytes == 16 * 256 // 4 + 16 * 2 * 8 * 4 + 256 * 4 + 16 * 4
    elif operation == "row_lut_gemv":
        assert row_lut_gemv.prepare(row_codebook(32, 128, 3)).bytes == 32 * 128 * 3 // 8 + 32 * 8 * 2
    else:
        assert lut_gemv.prepare(codebook(32, 128, (4,))).bytes == 32 * 128 // 2 + 128 * 16 * 4 + 128 * 8


def test_what_the_layouts_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"columns of 5 bits; the packed layout has 1 to 4: use backend=reference"):
        lut_gemv.prepare(codebook(4, 8, (2, 5)))
    with pytest.raises(ValueError, match=r"blocks of 20 columns; the packed layout takes multiples of 8: use backend=reference"):
        binary_gemv.prepare(signs(4, 40, 20))


@pytest.mark.parametrize("backend", [b for b in TABLE["lut_gemv"] if b not in ("cuda", "triton")])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_inputs_are_refused(operation: str, backend: str) -> None:
    if backend == "cpu" and operation not in FAST:
        pytest.skip("there is no C++ library")
    run = kernel(operation, backend).run
    packed = run.prepare(some(operation, 4, 96))
    for x in (inputs(9, 96), inputs(1, 64), inputs(1, 96, torch.float16)):
        with pytest.raises(ValueError, match=r"it must be float32 or bfloat16 \[1 to 8, 96\]"):
            getattr(run, operation)(x, packed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators_are_the_products(operation: str) -> None:
    operator = getattr(torch.ops.bitgrid, operation)
    for tensor in cases(operation)[2:4]:
        x = inputs(2, tensor.shape[1])
        packed: Any = PREPARE[operation](tensor)
        check(operator(x, *operands(packed)), x, tensor)
