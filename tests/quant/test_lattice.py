"""The lattice codebooks: golden values, and exact search against all codewords."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.lattice import CODEBOOKS, e8p_codewords, e81b_codewords, patterns


def gaussian() -> Tensor:
    return torch.from_numpy(np.random.RandomState(7).standard_normal((4096, 8)).astype(np.float32))


@pytest.mark.parametrize(("bits", "mse"), [(2, 0.0902433), (3, 0.0290761), (4, 0.0094658)])
def test_errors_on_gaussian_data_equal_the_reference_code(bits: int, mse: float) -> None:
    book = CODEBOOKS[bits]
    x = gaussian() * book.opt_scale
    q = book.decode(book.encode(x))
    assert float((q - x).double().square().mean()) / book.opt_scale**2 == pytest.approx(mse, abs=6e-8)


def test_first_codewords_and_codes_equal_the_reference_code() -> None:
    book = CODEBOOKS[2]
    (codes,) = book.encode(gaussian()[:4] * 1.03)
    assert codes.tolist() == [56341, 362, 11514, 30841]
    assert book.decode([codes])[0].tolist() == [2.25, -0.75, 0.25, 0.25, -0.75, 0.25, 0.25, -1.75]


@pytest.mark.parametrize(("scale", "mse"), [(0.9, 0.0990), (0.8, 0.1159), (1.2, 0.0999)])
def test_errors_at_other_scales_are_the_published_ones(scale: float, mse: float) -> None:
    # Published for another draw. A squared error varies by about as much as itself between vectors, and the tails more: 1 % for 12,000.
    x = scale * torch.randn(12000, 8, generator=torch.Generator().manual_seed(0))
    q = CODEBOOKS[2].decode(CODEBOOKS[2].encode(x))
    assert float((q - x).square().mean()) / scale**2 == pytest.approx(mse, rel=0.02)


def test_the_codebook_is_a_shifted_lattice() -> None:
    words = e8p_codewords().double()
    assert len(torch.unique(words, dim=0)) == 1 << 16
    assert sorted(set(words.square().sum(1).tolist())) == [0.5 + i for i in range(17)]
    minus = (words + 0.25) % 1 == 0.5
    plus = (words - 0.25) % 1 == 0.5
    assert (minus.all(1) ^ plus.all(1)).all()
    assert int(plus.all(1).sum()) == 1 << 15
    centred = words - torch.where(plus.all(1), 0.25, -0.25)[:, None]
    assert not (centred.sum(1) % 2).any()
    norms = patterns().square().sum(1)
    assert (int((norms <= 10).sum()), int((norms == 12).sum())) == (227, 29)


def test_the_residual_codebook_is_the_start_of_e8() -> None:
    words = e81b_codewords().double()
    assert len(torch.unique(words, dim=0)) == 256
    assert torch.bincount(words.square().sum(1).long()).tolist() == [1, 0, 240, 0, 15]
    halves = words[1:] % 1
    assert ((halves == 0).all(1) | (halves == 0.5).all(1)).all()
    assert not (words.sum(1) % 2).any()


@pytest.mark.parametrize("spread", [0.3, 1.03, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_finds_the_nearest_of_all_codewords(spread: float, dtype: torch.dtype) -> None:
    x = spread * torch.randn(300, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    x[0] = 0
    x[1] = e8p_codewords()[4711]
    (codes,) = CODEBOOKS[2].encode(x)
    words = e8p_codewords().double()
    distances = x.double().square().sum(1)[:, None] - 2 * x.double() @ words.T + words.square().sum(1)
    found = distances.gather(1, codes[:, None])[:, 0]
    # Scores of size up to |x|² + 16 are compared in the type of x.
    slack = 16 * torch.finfo(dtype).eps * (float(x.double().square().sum(1).max()) + 16)
    assert float((found - distances.min(1).values).max()) <= slack
    assert int(codes[1]) == 4711


def test_codewords_are_their_own_nearest() -> None:
    # Every 13th: all patterns, flips and shifts occur.
    (codes,) = CODEBOOKS[2].encode(e8p_codewords()[::13])
    assert torch.equal(codes, torch.arange(0, 1 << 16, 13))


@pytest.mark.parametrize("bits", [3, 4])
def test_residuals_are_searched_on_what_the_first_part_leaves(bits: int) -> None:
    book = CODEBOOKS[bits]
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(4))
    first, second = book.encode(x)
    assert torch.equal(first, CODEBOOKS[2].encode(x)[0])
    left = (x - e8p_codewords()[first]) * book.residual_scale
    words = book.words(1)
    best = torch.cdist(left.double(), words.double()).min(1).values
    assert torch.allclose((left - words[second]).double().norm(dim=1), best, rtol=1e-5, atol=1e-5)
    assert torch.allclose(book.decode([first, second]), e8p_codewords()[first] + words[second] / book.residual_scale)
