"""The stored format of per-column codebooks: exact packing, honest bits, the values its parts say."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.tensors import unpack
from quant.tensors.codebook import CodebookTensor, Outliers, bits_formula


def made(n: int, widths: list[int], kept: float, dtype: torch.dtype, seed: int) -> CodebookTensor:
    """Random codes and tables, and a share of weights kept aside."""
    g = torch.Generator().manual_seed(seed)
    k = len(widths)
    tops = torch.tensor([2**b for b in widths])
    codes = (torch.rand(n, k, generator=g) * tops).long().clamp(max=255).to(torch.uint8)
    tables = torch.randn(k, int(tops.max()), generator=g).to(dtype)
    tables = torch.where(torch.arange(int(tops.max())) < tops[:, None], tables, torch.zeros((), dtype=dtype))
    mask = torch.rand(k, n, generator=g) < kept
    outliers = Outliers(mask.sum(1), mask.nonzero()[:, 1], torch.randn(int(mask.sum()), generator=g).to(dtype)) if kept else None
    return CodebookTensor(codes, torch.tensor(widths), tables, 2.12, outliers)


def by_hand(t: CodebookTensor) -> Tensor:
    n, k = t.shape
    w = torch.empty(n, k)
    at = 0
    for j in range(k):
        for i in range(n):
            w[i, j] = t.tables[j, int(t.codes[i, j])]
        if t.outliers is not None:
            for _ in range(int(t.outliers.counts[j])):
                w[int(t.outliers.rows[at]), j] = t.outliers.values[at]
                at += 1
    return w


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 2, 7, 64, 256, 257, 300]),
    widths=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=9),
    kept=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_pack_and_unpack_are_inverse(n: int, widths: list[int], kept: float, dtype: torch.dtype, seed: int) -> None:
    t = made(n, widths, kept, dtype, seed)
    payload, meta = t.pack(), json.loads(json.dumps(t.meta()))
    again = unpack(t.format, payload, meta)
    assert isinstance(again, CodebookTensor)
    for name in ("codes", "widths", "tables"):
        assert torch.equal(getattr(again, name), getattr(t, name)), name
    assert torch.equal(again.dequantize(), t.dequantize())
    assert torch.equal(t.dequantize(), by_hand(t))
    assert t.dequantize().dtype is torch.float32
    assert (again.bits_nominal, again.bits_stored) == (2.12, t.bits_stored)
    assert t.bits_stored == 8 * sum(len(v.numpy().tobytes()) for v in payload.values()) / (n * len(widths))
    # Beside the formula: a column's index and count (at most 3 + 16 bits), less than a byte where a stream ends.
    assert -1e-9 <= (t.bits_stored - t.bits_formula) * n * len(widths) <= 24 * len(widths) + 8 * (len(payload) + 2)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 65536, 65537, 70000])
def test_row_numbers_of_any_size_are_kept_in_as_many_bits_as_they_need(n: int) -> None:
    rows = torch.tensor(sorted({0, n // 2, n - 1}))
    outliers = Outliers(torch.tensor([len(rows)]), rows, torch.arange(1.0, len(rows) + 1))
    t = CodebookTensor(torch.zeros(n, 1, dtype=torch.uint8), torch.tensor([1]), torch.zeros(1, 2), 1.0, outliers)
    payload = t.pack()
    again = unpack(t.format, payload, t.meta())
    assert isinstance(again, CodebookTensor)
    assert again.outliers is not None
    assert torch.equal(again.outliers.rows, rows)
    assert torch.equal(again.dequantize(), t.dequantize())
    width = max(1, (n - 1).bit_length())
    assert payload["outlier_rows"].numel() <= -(-len(rows) * width // 8) + width // 8 + 1


def test_an_input_scale_divides_the_columns() -> None:
    t = made(6, [2, 4, 2], 0.2, torch.float16, 0)
    s = torch.tensor([0.5, 2.0, 4.0])
    scaled = t.with_input_scale(s)
    assert torch.equal(scaled.dequantize(), t.dequantize() / s)
    assert scaled.input_scale is not None
    assert scaled.input_scale.dtype is torch.float16
    again = unpack(scaled.format, scaled.pack(), scaled.meta())
    assert torch.equal(again.dequantize(), scaled.dequantize())
    odd = t.with_input_scale(torch.tensor([1 / 3, 1.0, 1.0]))
    assert odd.input_scale is not None
    assert odd.input_scale.dtype is torch.float32


def test_formula_gives_the_published_storage() -> None:
    n = k = 4096
    assert bits_formula([2] * k, n, 16) == pytest.approx(2 + 0.0156, abs=1e-4)
    assert bits_formula([3] * k, n, 16) == pytest.approx(3 + 0.03125)
    assert bits_formula([4] * k, n, 16) == pytest.approx(4 + 0.0625)
    mixed = [4] * round(0.025 * k) + [2] * (k - round(0.025 * k))
    assert bits_formula(mixed, n, 16, outliers=2 * round(0.005 * n * k)) == pytest.approx(2.35, abs=5e-3)
    assert bits_formula([4] * round(0.05 * k) + [2] * (k - round(0.05 * k)), n, 16) == pytest.approx(2.12, abs=5e-3)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"codes \(3, 2\), widths \(2,\) and tables \(2, 8\) do not belong together"):
        CodebookTensor(codes, torch.tensor([2, 2]), torch.zeros(2, 8), 2.0)
    with pytest.raises(ValueError, match=r"1 outliers at 2 rows do not belong to counts of \(2,\)"):
        CodebookTensor(
            codes, torch.tensor([2, 2]), torch.zeros(2, 4), 2.0, Outliers(torch.tensor([1, 1]), torch.tensor([0, 1]), torch.zeros(1))
        )
