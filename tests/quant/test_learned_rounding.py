"""Learned rounding from its start to ranges that shrink; its iterates stand in `test_tuners.py`."""

from __future__ import annotations

import pytest
import torch

from quant import quantize_linear
from quant.methods.learned_rounding import LearnedRounding
from quant.methods.single import single_linear
from quant.scheme import WeightScheme
from tests.quant.test_tuners import random


def test_learned_rounding_starts_at_round_to_nearest() -> None:
    w = random(6, 32, dtype=torch.float32)
    want = quantize_linear(w, method="rtn", bits=3, group_size=8)
    for rule in ("autoround", "adaround"):
        got = quantize_linear(w, method="learned_rounding", bits=3, group_size=8, inputs=random(2, 5, 32), rule=rule, iters=0)
        assert torch.equal(got.dequantize(), want.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_ranges_too_small_for_float16_are_kept_in_float32(symmetric: bool) -> None:
    """Ranges whose scales just fit at the start: 4 bits take scales from 2^-20 on. The start is stored as it always was."""
    w = random(5, 16, dtype=torch.float32)
    w *= 1.01 * 15 * 2.0**-20 / (w.amax(1) - w.amin(1)).amin()
    scheme = WeightScheme(4, symmetric=symmetric)
    for tuner in (LearnedRounding(iters=4, checks=4), LearnedRounding(iters=2, checks=2)):
        ((_, rounded),) = tuner.tune(single_linear(w, 1e6 * random(2, 4, 16), scheme)).tensors.items()
        assert any("stored in float32" in n for n in rounded.notes) == (rounded.tensor.scale_dtype is torch.float32)
        assert float((rounded.tensor.dequantize() - w).norm() / w.norm()) < 0.2
