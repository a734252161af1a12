"""Tables of rows by weighted k-means: against exact dynamic programming, and the stored format."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.methods.base import Rounded
from quant.methods.squeezellm import SqueezeLlm
from quant.scheme import WeightScheme
from quant.statistics import Statistics
from quant.tensors import unpack
from quant.tensors.row_codebook import RowCodebookTensor, bits_formula
from tests.quant.test_kmeans import exact


def problem(n: int = 12, k: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight `[N, K]`, and a Hessian whose diagonal spreads over three powers of ten."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * k, k, generator=g, dtype=torch.float64) * 10 ** (1.5 * torch.rand(k, generator=g, dtype=torch.float64))
    return torch.randn(n, k, generator=g, dtype=torch.float64), 2 * x.T @ x


def rounded(w: Tensor, h: Tensor, bits: int = 3, scale_dtype: str = "float32", **params: Any) -> tuple[RowCodebookTensor, Rounded]:
    result = SqueezeLlm(**params).quantize(w, Statistics(hessian=h), WeightScheme(bits, scale_dtype=scale_dtype))
    assert isinstance(result.tensor, RowCodebookTensor)
    return result.tensor, result


def error(stored: RowCodebookTensor, w: Tensor, weights: Tensor) -> Tensor:
    """`[N]`: weighted squared errors."""
    return ((stored.dequantize().double() - w).square() * weights).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_close_to_the_least_and_below_those_without_weights(bits: int) -> None:
    w, h = problem()
    found = error(rounded(w, h, bits)[0], w, h.diagonal())
    for row, got in zip(w, found, strict=True):
        least = exact(row, 2**bits, h.diagonal())
        # As in test_kmeans.py: cuts do not know of weights. Tables are rounded to float32.
        assert least * (1 - 1e-5) <= float(got) <= 1.06 * least
    assert (found <= error(rounded(w, h, bits, weighting="none")[0], w, h.diagonal())).all()
    ones = torch.ones(w.shape[1]).double()
    plain = error(rounded(w, h, bits, weighting="none")[0], w, ones)
    for row, got in zip(w, plain, strict=True):
        assert float(got) <= 1.01 * exact(row, 2**bits)
    assert (plain < error(rounded(w, h, bits)[0], w, ones)).all()


def test_tables_are_the_weighted_means_of_their_weights_and_codes_the_nearest_values() -> None:
    w, h = problem()
    stored, _ = rounded(w, h)
    weights = h.diagonal()
    for row, codes, table in zip(w, stored.codes, stored.tables.double(), strict=True):
        assert torch.equal(codes.long(), (row[:, None] - table).abs().argmin(1))
        for c in codes.unique().tolist():
            mine = codes == c
            # Rounded to float32 in the end.
            assert float(table[c]) == pytest.approx(float((weights * row)[mine].sum() / weights[mine].sum()), rel=1e-6, abs=1e-6)


def test_rows_do_not_matter_to_each_other_and_one_factor_for_all_weights_changes_nothing() -> None:
    w, h = problem()
    stored, _ = rounded(w, h)
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounded(w[order], h)[0].dequantize(), stored.dequantize()[order])
    assert torch.equal(rounded(w, 4 * h)[0].dequantize(), stored.dequantize())
    assert torch.equal(rounded(w, torch.eye(w.shape[1]))[0].dequantize(), rounded(w, h, weighting="none")[0].dequantize())


def test_few_values_are_kept_exactly_and_inputs_that_are_always_zero_move_no_table() -> None:
    w, h = problem()
    w[3] = w[3].sign() * 0.5
    w[4] = 0
    stored, _ = rounded(w, h, bits=2, scale_dtype="float16")
    assert torch.equal(stored.dequantize()[3:5].double(), w[3:5])
    h[7], h[:, 7] = 0, 0
    other = w.clone()
    other[5, 7] += 0.3
    assert torch.equal(rounded(w, h)[0].tables[6], rounded(other, h)[0].tables[6])
    far = w.clone()
    far[:, 7] = 50
    # Nothing is gained by a value for it: all others are where they were, but for cuts that count it.
    kept = torch.arange(w.shape[1]) != 7
    near = error(rounded(far, h)[0], far, h.diagonal())
    assert (near <= 1.06 * torch.tensor([exact(row[kept], 8, h.diagonal()[kept]) for row in far])).all()


def test_without_any_calibration_token_all_weights_count_the_same() -> None:
    w, h = problem(4, 40)
    stored, result = rounded(w, torch.zeros_like(h))
    assert result.notes == ["all inputs are always 0 on the calibration text: all weights count the same"]
    assert torch.equal(stored.dequantize(), rounded(w, h, weighting="none")[0].dequantize())


def test_tables_that_float16_cannot_hold_are_float32() -> None:
    w, h = problem(4, 40)
    w[2] *= 1e6
    stored, result = rounded(w, h, scale_dtype="float16")
    assert stored.tables.dtype is torch.float32
    assert result.notes == ["1 of 4 codebooks do not fit float16; scales are stored in float32"]
    assert rounded(w[:2], h, scale_dtype="float16")[0].tables.dtype is torch.float16


def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weighting='fisher' is not .* one of hessian, none"):
        SqueezeLlm("fisher")
    codes = torch.zeros(3, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"codes \(3, 5\) of 2 bits and tables \(3, 8\) do not belong together"):
        RowCodebookTensor(codes, torch.zeros(3, 8), 2)
    with pytest.raises(ValueError, match="codes of 5 bits; tables of rows are for 2, 3, 4"):
        RowCodebookTensor(codes, torch.zeros(3, 32), 5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pack_and_unpack_are_inverse(bits: int, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (3, 7), (5, 33)):
        g = torch.Generator().manual_seed(n)
        codes = torch.randint(2**bits, (n, k), generator=g).to(torch.uint8)
        t = RowCodebookTensor(codes, torch.randn(n, 2**bits, generator=g).to(dtype), bits)
        again = unpack(t.format, t.pack(), json.loads(json.dumps(t.meta())))
        assert isinstance(again, RowCodebookTensor)
        assert torch.equal(again.codes, t.codes)
        assert torch.equal(again.tables, t.tables)
        by_hand = torch.tensor([[float(t.tables[i, int(t.codes[i, j])]) for j in range(k)] for i in range(n)])
        assert torch.equal(again.dequantize(), by_hand)
        # A bit stream ends on a whole byte.
        assert 0 <= (t.bits_stored - bits_formula(bits, k, 8 * t.tables.element_size())) * n * k + 1e-6 < 8
        scale = torch.linspace(0.5, 2.0, k).to(dtype)
        scaled = t.with_input_scale(scale)
        assert torch.equal(unpack(t.format, scaled.pack(), scaled.meta()).dequantize(), by_hand / scale.float())
    assert bits_formula(3, 4096) == 3.03125
