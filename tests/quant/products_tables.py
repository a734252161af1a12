"""Random tensors with tables and a product's error bound: what test_table_gemv.py says of tolerances. Importing this builds nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.kernels import binary_gemv, lut_gemv, row_lut_gemv
from quant.tensors.base import Stored
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor, Outliers
from quant.tensors.row_codebook import RowCodebookTensor
from tests.quant.products_affine import U_BFLOAT16, U

PREPARE = {"lut_gemv": lut_gemv.prepare, "row_lut_gemv": row_lut_gemv.prepare, "binary_gemv": binary_gemv.prepare}


def generator(*of: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(p * n for p, n in zip((1, 1000, 1000003), of, strict=False)))


def codebook(
    n: int, k: int, widths: tuple[int, ...], kept: int = 0, dtype: torch.dtype = torch.float16, scaled: bool = False
) -> CodebookTensor:
    """Columns take the widths in turn; the first row has the lowest codes, the last the highest; `kept` weights of every third column."""
    g = generator(n, k, kept)
    width = torch.tensor(widths)[torch.arange(k) % len(widths)]
    tables = torch.randn(k, 2 ** int(width.max()), generator=g).to(dtype)
    tables[torch.arange(tables.shape[1]) >= 2 ** width[:, None]] = 0
    codes = (torch.rand(n, k, generator=g) * 2**width).to(torch.uint8)
    codes[0], codes[-1] = 0, 2**width - 1
    outliers = None
    if kept:
        counts = torch.where(torch.arange(k) % 3 == 0, kept, 0)
        rows = torch.cat([torch.randperm(n, generator=g)[:kept].sort().values for _ in range(int((counts > 0).sum()))])
        outliers = Outliers(counts, rows, (9 * torch.randn(len(rows), generator=g)).to(dtype))
    inputs_scale = (torch.rand(k, generator=g) + 0.5).to(dtype) if scaled else None
    return CodebookTensor(codes, width, tables, 2.0, outliers, input_scale=inputs_scale)


def tables_of_sizes(widths: tuple[int, ...], dtype: torch.dtype) -> CodebookTensor:
    """Columns from 2^-20 to 2^20 (float16: 2^-8 to 2^8) of their tables, one of zeros, and values just below a power of two."""
    tensor = codebook(67, 390, widths, dtype=dtype)
    most = 20 if dtype is torch.float32 else 8
    tables = tensor.tables * (2.0 ** (torch.arange(390) % (2 * most) - most)).to(dtype)[:, None]
    tables[5] = 0
    tables[7, 0], tables[7, 1] = (2 - 2.0**-23, -(2 - 2.0**-23)) if dtype is torch.float32 else (2 - 2.0**-10, -(2 - 2.0**-10))
    return replace(tensor, tables=tables)


def row_codebook(n: int, k: int, bits: int, dtype: torch.dtype = torch.float16, scaled: bool = False) -> RowCodebookTensor:
    """The first row has the lowest codes, the last the highest."""
    g = generator(n, k, bits)
    codes = torch.randint(2**bits, (n, k), generator=g).to(torch.uint8)
    codes[0], codes[-1] = 0, 2**bits - 1
    inputs_scale = (torch.rand(k, generator=g) + 0.5).to(dtype) if scaled else None
    return RowCodebookTensor(codes, torch.randn(n, 2**bits, generator=g).to(dtype), bits, input_scale=inputs_scale)


def signs(n: int, k: int, block: int, means: bool = True, dtype: torch.dtype = torch.float16, scaled: bool = False) -> BinaryTensor:
    g = generator(n, k, block)
    salient = torch.rand(k, generator=g) < 0.2
    flags = torch.rand(3, n, k, generator=g) < 0.5
    blocks = -(-k // block)
    scale = torch.rand(n, blocks, 4, generator=g).to(dtype)
    mean = torch.randn(n, blocks, 3, generator=g).to(dtype) if means else None
    inputs_scale = (torch.rand(k, generator=g) + 0.5).to(dtype) if scaled else None
    return BinaryTensor(flags[0], flags[1] & salient, flags[2] & ~salient, salient, scale, mean, block, input_scale=inputs_scale)


def cases(operation: str) -> list[Any]:
    if operation == "binary_gemv":
        return [
            signs(n, k, block, means, dtype, scaled)
            for n, k, block, means, dtype, scaled in (
                (13, 256, 128, True, torch.float16, False),
                (1, 8, 8, True, torch.float32, True),
                (9, 200, 32, False, torch.float16, True),
                (8, 1000, 64, True, torch.float16, False),
                (3, 300, 24, True, torch.float32, False),
                (5, 129, 128, True, torch.float16, False),
            )
        ]
    if operation == "row_lut_gemv":
        return [
            row_codebook(n, k, bits, dtype, scaled)
            for n, k, bits, dtype, scaled in (
                (33, 160, 2, torch.float16, False),
                (1, 1, 3, torch.float32, True),
                (40, 129, 3, torch.float16, True),
                (32, 97, 4, torch.float32, False),
                (70, 517, 4, torch.float16, False),
                (31, 1031, 3, torch.float32, True),
                (5, 2200, 2, torch.float32, False),
            )
        ]
    return [
        codebook(n, k, widths, kept, dtype, scaled)
        for n, k, widths, kept, dtype, scaled in (
            (33, 256, (2,), 0, torch.float16, False),
            (1, 1, (1,), 0, torch.float32, True),
            (40, 300, (1, 3), 0, torch.float16, True),
            (32, 517, (4,), 3, torch.float16, False),
            (70, 96, (2, 4), 5, torch.float32, True),
            (31, 1031, (1, 2, 3, 4), 1, torch.float16, False),
        )
    ]


def exact(x: Tensor, tensor: Stored) -> tuple[Tensor, Tensor, int]:
    """float64 `[M, N]`: the product and A; roundings on the way."""
    plain = replace(tensor, input_scale=None)  # type: ignore[type-var]
    weight = plain.dequantize().double()
    size, roundings = weight.abs(), 2 * 16 + x.shape[1] // 8 + 8
    if isinstance(plain, RowCodebookTensor):
        roundings = 2 * 32 + x.shape[1] // 32 + 2 * 8 + 8
    if isinstance(plain, CodebookTensor):
        roundings = 256 + x.shape[1] // 64 + 8
        if plain.outliers is not None:
            size = size + 2 * replace(plain, outliers=None).dequantize().double().abs()
            roundings += len(plain.outliers.counts)
    given = x.double() if tensor.input_scale is None else x.double() / tensor.input_scale.double()
    return given @ weight.T, given.abs() @ size.T, roundings


def check(got: Tensor, x: Tensor, tensor: Stored, off: Tensor | float = 0.0) -> None:
    """off: what a backend's operands are off by, for each sum."""
    want, size, roundings = exact(x, tensor)
    bound = roundings * U * size + off
    if got.dtype is torch.bfloat16:
        bound = bound + U_BFLOAT16 * (want.abs() + bound)
    assert got.dtype == x.dtype
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"{float((error / bound).max())} x the bound"
    # Single errors have either sign: as a whole they are far below their bound.
    assert error.norm() <= 16 * (U if x.dtype is torch.float32 else U_BFLOAT16) * size.norm()
