"""The weight of signs as CUDA C++ writes it: more rows than one launch has blocks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.binary_gemv import Packed, cuda, digits
from tests.quant.products_tables import signs


def written(name: str, function: str, *given: Tensor | int) -> None:
    """As `bitgrid_binary_values`, which reads tables by the number of rows alone; a grid is 2 blocks high at most."""
    words, tables, kinds, largest, out, rows, k, block, bfloat16 = given
    assert (name, function, -(-rows // 8)) == ("binary_gemv", "bitgrid_binary_values", len(words))
    assert len(words) <= 2
    assert all(t.is_contiguous() for t in (words, tables, kinds, largest, out))
    made = Packed(words, tables, kinds, largest, None, (rows, k), block).values(torch.float32)
    out.copy_(made.bfloat16() if bfloat16 else made)


@pytest.mark.parametrize("rows", [8, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_beyond_a_launch_are_those_of_one(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = digits.prepare(signs(rows, 300, 128))
    monkeypatch.setattr(cuda, "MOST_TILES", 2)
    monkeypatch.setattr(on_cuda, "call", written)
    assert torch.equal(cuda.values(packed, dtype), packed.values(torch.float32).to(dtype))


@pytest.mark.gpu("nvcc")
def test_more_rows_than_a_launch_has_blocks_for() -> None:
    tensor = signs(8 * cuda.MOST_TILES + 11, 8, 8)
    packed = digits.prepare(tensor)
    there = Packed(*(t.cuda() for t in (packed.words, packed.tables, packed.salient, packed.largest)), None, packed.shape, packed.block)
    assert torch.equal(cuda.values(there).cpu(), packed.values(torch.float32))
