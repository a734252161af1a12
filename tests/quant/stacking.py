"""Linears that are quantized in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant.scheme import WeightScheme
from quant.statistics import Statistics


def are_alone(method: Any, weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[WeightScheme]) -> None:
    """Each is what it is alone, bit for bit."""
    assert method.stacks(weights, schemes)
    together = method.quantize_stacked(weights, statistics, schemes)
    assert len(together) == len(weights)
    for weight, scheme, got in zip(weights, schemes, together, strict=True):
        want = method.quantize(weight, statistics, scheme)
        assert (got.damp, got.notes, got.details) == (want.damp, want.notes, want.details)
        assert got.tensor.meta() == want.tensor.meta()
        mine, alone = got.tensor.pack(), want.tensor.pack()
        assert mine.keys() == alone.keys()
        assert all(torch.equal(mine[name], alone[name]) for name in mine)
