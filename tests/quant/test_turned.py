"""`turned`: matrices laid out by columns."""

from __future__ import annotations

import pytest
import torch

from quant.kernels import kernel
from quant.kernels.on_triton import unavailable
from quant.kernels.turned import triton
from quant.solver import by_columns, by_rows

CPU = torch.device("cpu")
PLACES = ["torch", pytest.param("triton", marks=pytest.mark.skipif(unavailable(CPU) is not None, reason=str(unavailable(CPU))))]
TYPES = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.uint8, torch.uint8)]


def check(backend: str, r: int, c: int, given: torch.dtype, wanted: torch.dtype, device: torch.device = CPU) -> None:
    """Source and out are parts of larger tensors, whose other numbers stay."""
    g = torch.Generator().manual_seed(r + c)
    numbers = torch.randint(0, 256, (r, c + 5), generator=g) if wanted is torch.uint8 else torch.randn(r, c + 5, generator=g)
    source = numbers.to(device, given)
    around = torch.full((c, r + 7), 77, dtype=wanted, device=device)
    kernel("turned", backend, device).run.turned(source[:, 2 : 2 + c], around[:, 3 : 3 + r])
    assert torch.equal(around[:, 3 : 3 + r], source[:, 2 : 2 + c].T.to(wanted))
    assert (around[:, :3] == 77).all()
    assert (around[:, 3 + r :] == 77).all()


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize(("given", "wanted"), TYPES)
@pytest.mark.parametrize(("r", "c"), [(1, 1), (130, 70), (64, 128)])
def test_every_number_is_where_it_belongs(backend: str, r: int, c: int, given: torch.dtype, wanted: torch.dtype) -> None:
    check(backend, r, c, given, wanted)


@pytest.mark.parametrize("backend", PLACES)
def test_what_is_turned_already(backend: str) -> None:
    source, out = torch.arange(6.0).view(3, 2).T, torch.empty(3, 2)
    kernel("turned", backend).run.turned(source, out)
    assert torch.equal(out, source.T)


def test_what_does_not_fit_is_refused() -> None:
    for out in (torch.empty(2, 3), torch.empty(2, 3).T):
        with pytest.raises(ValueError, match=r"it is to be \(3, 2\) with contiguous rows"):
            triton.turned(torch.empty(2, 3), out)


@pytest.mark.gpu("triton")
@pytest.mark.parametrize(("given", "wanted"), TYPES)
@pytest.mark.parametrize(("r", "c"), [(1, 1), (130, 70), (4096, 1056)])
def test_on_a_gpu(r: int, c: int, given: torch.dtype, wanted: torch.dtype) -> None:
    check("triton", r, c, given, wanted, torch.device("cuda"))


@pytest.mark.gpu("triton")
def test_weights_come_and_codes_go_by_columns_on_a_gpu() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(n, 96, generator=g, device="cuda").bfloat16() for n in (32, 160)]
    columns = by_columns(weights)
    assert torch.equal(columns, torch.cat(weights).float().T)
    codes = columns.abs().mul(50).clamp(max=255).byte()
    for got, want in zip(by_rows(codes, [32, 160]), torch.split(codes.T, [32, 160]), strict=True):
        assert got.dtype is torch.uint8
        assert got.is_contiguous()
        assert torch.equal(got, want)
