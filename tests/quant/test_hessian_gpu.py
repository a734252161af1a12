"""The lower triangle in Gluon: which blocks its programs add, and on a CUDA device of compute capability 9.0 what they add."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.hessian_syrk import triton
from quant.kernels.hessian_syrk.triton import HOPPER, pairs


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 32, 33, 86])
def test_programs_add_every_block_of_the_triangle_once(blocks: int) -> None:
    found = []
    for left, first, second, both, turned in pairs(blocks):
        assert {left, first, second} <= set(range(blocks))
        for right in (first, second)[: 1 + both]:
            found.append((right, left) if turned else (left, right))
    assert sorted(found) == [(i, j) for i in range(blocks) for j in range(i + 1)]


def test_models_channels_are_whole_waves() -> None:
    """Of 132 multiprocessors; no program but the last has one block alone."""
    assert len(pairs(4096 // HOPPER.rows)) == 2 * 132
    assert all(sum(not both for *_, both, _ in pairs(n)) <= 1 for n in range(1, 90))


def test_totals_beyond_offsets_of_32_bits_are_refused() -> None:
    assert triton.MOST**2 < 2**31 <= (triton.MOST + 1) ** 2
    assert triton.refuses(triton.MOST) is None
    with pytest.raises(ValueError, match=r"53248 channels; the Triton programs take up to 46340; kernel\(\.\.\., channels=53248\)"):
        triton.add(torch.empty(53248, 0), torch.empty(1, 1, 53248))


@pytest.mark.gpu("triton")
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or not triton.gluon_works(),
    reason="there is no CUDA device of compute capability 9.0, or Triton has another Gluon",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sequences", "length", "k"), [(2, 8192, 384), (3, 100, 640), (1, 64, 128), (2, 8320, 256), (5, 320, 1024)])
def test_sums_are_those_of_whole_numbers(sequences: int, length: int, k: int, dtype: torch.dtype) -> None:
    """Products of whole numbers up to 4 sum up below 2^24: every sum is exact, whichever partial sums there are."""
    g = torch.Generator("cuda").manual_seed(length)
    x = torch.randint(-4, 5, (sequences, length, k), generator=g, device="cuda").to(dtype)
    start = torch.randint(-9, 10, (k, k), generator=g, device="cuda").float()
    start = start + start.T
    flat = x.flatten(0, 1).double()
    want = (flat.T @ flat + start.double()).float()
    together, apart = start.clone(), start.clone()
    triton.add(together, x, HOPPER)
    for sequence in x:
        triton.add(apart, sequence[None], HOPPER)
    assert torch.equal(triton.finished(together), want)
    assert torch.equal(triton.finished(apart), want)
    # Of other numbers the bits are the same as well.
    y = torch.randn(x.shape, generator=g, device="cuda").to(dtype)
    together, apart = start.clone(), start.clone()
    triton.add(together, y, HOPPER)
    for sequence in y:
        triton.add(apart, sequence[None], HOPPER)
    assert torch.equal(triton.finished(together), triton.finished(apart))
