"""Rows rounded to grids of their own: twins against the grids, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant.activation import fake_quantize
from quant.kernels import kernel, native

INF, NAN = float("inf"), float("nan")


pytestmark = pytest.mark.skipif(
    native.unavailable("fake_quantize", torch.device("cpu")) is not None, reason="there is no C++ compiler, and one twin alone"
)


def same(got: Tensor, want: Tensor) -> None:
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def agree(x: Tensor, bits: int, symmetric: bool, clip: float, backend: str = "cpu") -> None:
    """Values and codes, bit for bit."""
    run, plain = kernel("fake_quantize", backend).run, kernel("fake_quantize", "reference").run
    same(run.fake_quantize(x, bits, symmetric, clip), plain.fake_quantize(x, bits, symmetric, clip))
    got, want = run.encode(x, bits, symmetric, clip), plain.encode(x, bits, symmetric, clip)
    same(got.scale, want.scale)
    told = ~want.scale.isnan()[:, 0]  # codes of a row with a NaN mean nothing
    same(got.zero[told], want.zero[told])
    same(got.codes[told], want.codes[told])
    assert got.sums is None or torch.equal(got.sums[told], want.codes.sum(1, dtype=torch.int32)[told])


@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 40),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    clip=st.sampled_from([1.0, 0.9]),
    decade=st.integers(-12, 30),
    seed=st.integers(0, 99),
)
def test_rows_of_any_size_are_rounded_as_the_grids_say(
    rows: int, width: int, bits: int, symmetric: bool, clip: float, decade: int, seed: int
) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0**decade
    agree(x, bits, symmetric, clip)


def test_halves_go_to_the_even_code() -> None:
    """Of steps with 10 bits, so that values halfway between two codes are float32 numbers: a product with 1 / step would miss some."""
    step, halves = 1 + torch.arange(512)[:, None] / 512, torch.arange(-126, 126) + 0.5
    x = torch.cat([127 * step, step * halves], dim=1)
    made = kernel("fake_quantize", "cpu").run.encode(x, 8, True)
    same(made.scale, step)
    assert torch.equal(made.codes[:, 1:], halves.round().to(torch.int8).expand(512, -1))
    agree(x, 8, False, 1.0)


ODD = [
    [0.0, 0.0, 0.0],
    [-0.0, 0.0, -0.0],
    [2.5, 2.5, 2.5],
    [-2.5, -2.5, -2.5],
    [NAN, 1.0, 2.0],
    [1.0, 2.0, NAN],
    [INF, 1.0, -1.0],
    [1.0, -INF, 2.0],
    [INF, -INF, 0.0],
    [INF, INF, INF],
    [1e12, 1.0001e12, 1.0002e12],
    [1e-45, -1e-45, 0.0],
    [127.0, 0.5, 1.5],
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("repeats", [1, 5])
def test_rows_without_a_range_and_numbers_that_are_none(symmetric: bool, repeats: int) -> None:
    x = torch.tensor(ODD).repeat(1, repeats)
    got = kernel("fake_quantize", "cpu").run.fake_quantize(x, 8, symmetric)
    same(got, kernel("fake_quantize", "reference").run.fake_quantize(x, 8, symmetric))
    assert got[4:6].isnan().all(), "a NaN makes its row NaN"
    assert not got[:2].signbit().any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_give_the_values(symmetric: bool) -> None:
    x = torch.randn(40, 19, generator=torch.Generator().manual_seed(0))
    run = kernel("fake_quantize").run
    made = run.encode(x, 8, symmetric, 0.9)
    assert made.codes.dtype is torch.int8
    same((made.codes.float() - made.zero) * made.scale, run.fake_quantize(x, 8, symmetric, 0.9))
    assert bool(made.zero.any()) is not symmetric


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_and_strides_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(24, 2, 10, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(0, 1)
    want = kernel("fake_quantize", "reference").run.fake_quantize(x.reshape(-1, 10), 4, True).view(x.shape)
    same(fake_quantize(x, 4, True), want)
    for run in (kernel("fake_quantize", backend).run for backend in ("cpu", "reference")):
        got, single = (run.encode(values.reshape(-1, 10), 4, False) for values in (x, x.float()))
        same(got.codes, single.codes)
        same(got.scale, single.scale)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    x = torch.randn(300, 9, generator=torch.Generator().manual_seed(0))
    want, before = fake_quantize(x, 8, False), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        same(fake_quantize(x, 8, False), want)
    finally:
        torch.set_num_threads(before)
