"""BiLLM's searches in C++ against torch's, which test_billm.py holds to plain loops.

Tolerance: a row's error is made of sums of C squares in float32, each off by (C + 20) u Σx² at most, u = 2^-24, in either twin.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.braq_block.eager import first_least, reference_quantiles

pytestmark = pytest.mark.skipif(kernel("braq_search").backend != "cpu", reason="there is no C++ library")
SHAPES = [(1, 1), (7, 3), (8, 128), (65, 50), (130, 17)]


def values(n: int, c: int, tied: bool = False) -> Tensor:
    x = torch.randn(n, c, generator=torch.Generator().manual_seed(n * c))
    return (2 * x).round() if tied else x


def bound(x: Tensor) -> float:
    return 2 * (x.shape[1] + 20) * 2.0**-24 * float(x.double().square().sum())


@pytest.mark.parametrize(("n", "c"), SHAPES)
def test_counts(n: int, c: int) -> None:
    x, counts = values(n, c), range(min(c, 49) + 1)
    got, want = (kernel("braq_search", b).run.order_two_errors(x, counts) for b in ("cpu", "torch"))
    assert torch.allclose(got, want, rtol=0, atol=bound(x))
    exact = kernel("braq_search", "torch").run.order_two_errors(x.double(), counts)
    assert exact[first_least(got)] <= exact.min() + bound(x)


@pytest.mark.parametrize(("n", "c"), SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_thresholds(n: int, c: int, tied: bool) -> None:
    """Sums along a row are float64 in both: only their order differs."""
    x = values(n, c, tied)
    thresholds = torch.cat([torch.tensor([0.0, 1.0, 1e9]), reference_quantiles(x.abs())])
    got, want = (kernel("braq_search", b).run.split_errors(x, thresholds) for b in ("cpu", "torch"))
    assert torch.allclose(got, want, rtol=0, atol=1e-12 * float(x.double().square().sum()))


def test_threads_and_rows_beside_change_nothing() -> None:
    x, t = values(1000, 64), torch.tensor([0.5, 1.0])
    run = kernel("braq_search", "cpu").run
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((run.order_two_errors(x, range(1, 30)), run.split_errors(x, t)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights are torch.float64; the C\+\+ search takes torch.float32: use backend=torch"):
        kernel("braq_search", "cpu").run.split_errors(values(4, 4).double(), torch.tensor([1.0]))
