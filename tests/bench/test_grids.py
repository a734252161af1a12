"""The comparison of static and dynamic ranges on made-up figures with a known difference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.grids import Ranges, compared


def test_a_known_difference_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    windows = rng.normal(3.0, 0.5, 100)
    noise = rng.normal(0, 0.02, 100)
    static = Ranges([0.01, 0.03], [windows, windows], 4.5)
    # Draws differ by ± 0.05, which their mean does not.
    dynamic = Ranges([0.05, 0.03], [windows + 0.1 + noise - 0.05, windows + 0.1 + noise + 0.05], 4.5)
    told = compared(static, dynamic)
    assert told["static"]["perplexity"] == pytest.approx(math.exp(windows.mean()))
    assert told["loss_ratio"] == pytest.approx(2)
    assert told["nats"] == pytest.approx(0.1 + noise.mean())
    # Of the paired differences: what windows have in common is not in it.
    assert told["nats_half"] == pytest.approx(1.96 * noise.std(ddof=1) / 10)
