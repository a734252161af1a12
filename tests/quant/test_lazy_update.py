"""`lazy_update`: later weights less a product over the columns of a block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.on_triton import unavailable

CPU = torch.device("cpu")
PLACES = ["torch", pytest.param("triton", marks=pytest.mark.skipif(unavailable(CPU) is not None, reason=str(unavailable(CPU))))]
GPU = pytest.mark.gpu("triton")
UNIT = 2.0**-24


def given(r: int, n: int, b: int, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Left as the solver has it, rows of a factor; numbers of many sizes, so that each part of a sum is felt."""
    g = torch.Generator().manual_seed(r + n + b)
    later, factor, right = (torch.randn(s, generator=g) * 2.0 ** torch.randint(-6, 7, s, generator=g) for s in ((r, n), (b, r), (b, n)))
    return later.to(device), factor.to(device).T, right.to(device)


def check(run: object, later: Tensor, left: Tensor, right: Tensor) -> None:
    want, size = later.double() - left.double() @ right.double(), left.double().abs() @ right.double().abs()
    run.lazy_update(later, left, right)  # type: ignore[attr-defined]
    # Products are off by 3 u at most (two parts of TF32 each, the smallest product left out), sums of B by B u more, and the last by one.
    bound = (left.shape[1] + 8) * UNIT * size + UNIT * want.abs()
    assert ((later.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize(("r", "n", "b"), [(1, 1, 1), (33, 40, 16), (64, 31, 20), (5, 70, 128)])
def test_it_takes_a_product_off(backend: str, r: int, n: int, b: int) -> None:
    check(kernel("lazy_update", backend).run, *given(r, n, b))


@pytest.mark.parametrize("backend", PLACES)
def test_strided_parts_of_larger_tensors(backend: str) -> None:
    """As the solver has them: rows of the weights, rows of the factor right of its block; what lies beside them stays as it is."""
    run = kernel("lazy_update", backend).run
    later, left, right = given(40, 36, 24)
    around, factor = torch.full((50, 48), torch.nan), torch.full((24, 60), torch.nan)
    around[10:, :36], factor[:, 20:] = later, left.T
    run.lazy_update(around[10:, :36], factor[:, 20:].T, right)
    run.lazy_update(later, left, right)
    assert torch.equal(around[10:, :36], later)
    assert around[:10].isnan().all()
    assert around[:, 36:].isnan().all()


@pytest.mark.parametrize("backend", PLACES)
def test_parts_have_what_they_have_alone(backend: str) -> None:
    run = kernel("lazy_update", backend).run
    later, left, right = given(20, 16 + 48 + 8, 32)
    alone = [t.clone() for t in torch.split(later, [16, 48, 8], dim=1)]
    for part, own in zip(alone, torch.split(right, [16, 48, 8], dim=1), strict=True):
        run.lazy_update(part, left, own.contiguous())
    run.lazy_update(later, left, right, [16, 48, 8])
    assert torch.equal(later, torch.cat(alone, dim=1))


def test_float64_is_torchs() -> None:
    later = torch.zeros(2, 3, dtype=torch.float64)
    assert kernel("lazy_update", device="cpu", later=later).backend == "torch"
    if unavailable(CPU) is None:
        triton = kernel("lazy_update", "triton").run
        assert "float64" in triton.refuses(later)
        with pytest.raises(ValueError, match="float64"):
            triton.lazy_update(later, torch.zeros(2, 1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))


@GPU
@pytest.mark.parametrize(("r", "n", "b"), [(130, 4096, 128), (1000, 300, 128), (7, 5, 44)])
def test_on_a_gpu(r: int, n: int, b: int) -> None:
    run = kernel("lazy_update", "triton", "cuda").run
    later, left, right = given(r, n, b, torch.device("cuda"))
    check(run, later.clone(), left, right)
    alone = later[:, : n // 2].clone()
    run.lazy_update(alone, left, right[:, : n // 2])
    run.lazy_update(later, left, right)
    assert torch.equal(later[:, : n // 2], alone)
