"""The stored format of mixed widths: exact packing, honest bits."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.tensors import unpack
from quant.tensors.mixed import MixedTensor, bits_formula


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5),
    size=st.integers(1, 9),
    base=st.integers(2, 7),
    steps=st.lists(st.integers(-1, 1), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_packing_is_exact_and_as_large_as_the_formula_says(
    n: int, size: int, base: int, steps: list[int], dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    widths = tuple(base + s for s in steps)
    codes = torch.stack([torch.randint(0, 2**b, (n, size), generator=g) for b in widths], 1).view(n, -1).to(torch.uint8)
    zero = torch.stack([torch.randint(0, 2**b if b > 1 else 1, (n,), generator=g) for b in widths], 1).to(torch.uint8)
    scale = torch.rand(n, len(widths), generator=g).to(dtype)
    mean = torch.randn(n, widths.count(1), generator=g).to(dtype)
    tensor = MixedTensor(codes, scale, zero, mean, widths, base)
    for t in (tensor, tensor.with_input_scale(torch.linspace(0.5, 2, codes.shape[1]))):
        again = unpack(t.format, t.pack(), json.loads(json.dumps(t.meta())))
        assert isinstance(again, MixedTensor)
        assert again.widths == widths
        assert all(torch.equal(getattr(again, f), getattr(t, f)) for f in ("codes", "scale", "zero", "mean"))
        assert torch.equal(again.dequantize(), t.dequantize())
    formula = bits_formula(widths, n, size, 8 * scale.element_size())
    assert 0 <= (tensor.bits_stored - formula) * codes.numel() <= 8 * len(tensor.pack())
    if 1 in widths:
        assert tensor.pack()["codes_1"].numel() == -(-n * size * widths.count(1) // 8)


def test_the_formula_is_the_papers_for_balanced_groups() -> None:
    assert bits_formula([3] * 30 + [2, 4], 4096, 128) == pytest.approx(3 + (16 + 3) / 128 + 2 / (128 * 4096))


def test_widths_far_from_the_base_are_refused() -> None:
    part = torch.zeros(1, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"widths \[2, 4\] must lie .* within 1 of the base width 2"):
        MixedTensor(part, torch.ones(1, 2), part, torch.zeros(1, 0), (2, 4), 2)
