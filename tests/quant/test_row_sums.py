"""`row_sums`: what tells a matrix from another."""

from __future__ import annotations

import pytest
import torch

from quant.kernels import kernel
from quant.kernels.on_triton import unavailable

CPU = torch.device("cpu")
PLACES = ["torch", pytest.param("triton", marks=pytest.mark.skipif(unavailable(CPU) is not None, reason=str(unavailable(CPU))))]


def check(backend: str, r: int, c: int, device: torch.device = CPU) -> None:
    g = torch.Generator().manual_seed(r + c)
    bits = torch.randint(-(2**31), 2**31, (r, c), generator=g).to(torch.int32)
    odd = torch.randint(-(2**62), 2**62, (c,), generator=g) * 2 + 1
    want = [sum(b * o for b, o in zip(row, odd.tolist(), strict=True)) for row in bits.tolist()]
    got = kernel("row_sums", backend, device).run.row_sums(bits.to(device), odd.to(device))
    assert [(int(t) - w) % 2**64 for t, w in zip(got, want, strict=True)] == [0] * r


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize(("r", "c"), [(1, 1), (9, 70), (5, 1100)])
def test_sums_are_of_whole_numbers(backend: str, r: int, c: int) -> None:
    check(backend, r, c)


@pytest.mark.gpu("triton")
@pytest.mark.parametrize(("r", "c"), [(1, 1), (130, 1100), (64, 4096)])
def test_on_a_gpu(r: int, c: int) -> None:
    check("triton", r, c, torch.device("cuda"))
