"""Hadamard matrices of every order, and the transform against the matrix."""

from __future__ import annotations

import pytest
import torch

from quant.hadamard import apply_hadamard, hadamard_block, hadamard_matrix, mix, small_factor
from quant.kernels import kernel
from quant.kernels.hadamard.matrices import SMALL, small
from tests.quant.golden_inputs import weight

ORDERS = sorted({1, 2, 4, 8, 64, *SMALL, *(2 * m for m in SMALL), 8 * 12, 16 * 28})


@pytest.mark.parametrize("n", ORDERS)
def test_every_order_is_a_hadamard_matrix(n: int) -> None:
    signs = apply_hadamard(torch.eye(n, dtype=torch.float64), normalize=False)
    assert torch.equal(signs.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(signs @ signs.T, n * torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(hadamard_matrix(n), signs / n**0.5, rtol=1e-15, atol=0)


@pytest.mark.parametrize("n", [8, 12, 40, 96, 172])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_transform_is_the_product_with_the_matrix(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    before = x.clone()
    # Sums of n terms of size 1 / √n: a few units of the type's precision.
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(apply_hadamard(x).double(), x.double() @ hadamard_matrix(n), rtol=eps, atol=eps)
    back = apply_hadamard(apply_hadamard(x), transpose=True)
    torch.testing.assert_close(back, x, rtol=2 * eps, atol=2 * eps)
    assert torch.equal(x, before)
    assert apply_hadamard(x).dtype is dtype
    if dtype is torch.bfloat16:
        assert torch.equal(apply_hadamard(x), apply_hadamard(x.float()).to(dtype)), "rounded once"


def test_blocks_are_mixed_alone() -> None:
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = torch.kron(torch.eye(2, dtype=torch.float64), hadamard_matrix(12))
    torch.testing.assert_close(mix(x, 12), x @ matrix, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(mix(x, 12, transpose=True), x @ matrix.T, rtol=1e-14, atol=1e-14)
    assert mix(x, 0) is x


@pytest.mark.parametrize("n", [1, 8, 96])
def test_the_kernel_takes_every_order(n: int) -> None:
    """By the reference it is what rotates weights, bit for bit, and its codes those of fake quantization."""
    run = kernel("hadamard", "reference").run
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    for transpose in (False, True):
        assert torch.equal(run.transform(x, 1.0, transpose), apply_hadamard(x, transpose=transpose, normalize=False))
    got, want = run.encode(x, 4, False, factor=0.5), kernel("fake_quantize").run.encode(run.transform(x, 0.5), 4, False)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 12, 96])
def test_the_reference_multiplies_by_the_factor_and_gives_memory_of_its_own(n: int, dtype: torch.dtype) -> None:
    """In float32 at least, rounded once: of n numbers of size 1, n units of float32 in the sum and half of the type's own."""
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    for factor in (1.0, 0.3, 2.0):
        made = kernel("hadamard", "reference").run.transform(x, factor)
        want = factor * (x.double() @ hadamard_matrix(n)) * n**0.5
        sums = n * factor * float(x.double().abs().sum(1).max())
        torch.testing.assert_close(
            made.double(),
            want,
            rtol=torch.finfo(dtype).eps,
            atol=sums * torch.finfo(max(dtype, torch.float32, key=lambda t: t.itemsize)).eps,
        )
        assert made.dtype is dtype
        assert made.is_contiguous()
        assert made.data_ptr() != x.data_ptr()


def test_the_small_factor_is_the_slow_index() -> None:
    torch.testing.assert_close(hadamard_matrix(48), torch.kron(hadamard_matrix(12), hadamard_matrix(4)), rtol=1e-14, atol=0)
    torch.testing.assert_close(hadamard_matrix(80), torch.kron(hadamard_matrix(40), hadamard_matrix(2)), rtol=1e-14, atol=0)


def test_golden_values_of_the_reference_transform() -> None:
    eight = apply_hadamard(torch.eye(8), normalize=False)
    assert eight[1].tolist() == [1, -1, 1, -1, 1, -1, 1, -1]
    assert eight[2].tolist() == [1, 1, -1, -1, 1, 1, -1, -1]
    twelve = apply_hadamard(torch.arange(1.0, 13.0))
    assert twelve[:6].tolist() == pytest.approx([-21.939311, 4.041452, 1.154701, 4.618802, 1.732051, -1.154701], abs=2e-6)
    assert apply_hadamard(weight())[0, :4].tolist() == pytest.approx([-0.100148, -0.602371, -0.611111, 2.617039], abs=2e-6)


def test_sizes_without_a_matrix_name_the_block_that_works() -> None:
    assert (small_factor(40), small_factor(80), small_factor(20), small_factor(64), small_factor(44)) == (40, 40, 20, 1, None)
    assert (hadamard_block(172), hadamard_block(44), hadamard_block(7), hadamard_block(11008)) == (172, 4, 1, 11008)
    with pytest.raises(ValueError, match=r"no Hadamard matrix of order 44 .* 2\^k times 12, 20, 28.*blocks of 4"):
        apply_hadamard(torch.zeros(44))
    with pytest.raises(ValueError, match="order 0; the order is at least 1"):
        small_factor(0)


def test_what_was_evaluated_first_is_learned_through_afterwards() -> None:
    """A process keeps small factors: one that inference mode saw first serves a gradient."""
    small.cache_clear()
    with torch.inference_mode():
        apply_hadamard(torch.ones(2, 12))
    x = torch.ones(2, 12, requires_grad=True)
    apply_hadamard(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(2, 12))
