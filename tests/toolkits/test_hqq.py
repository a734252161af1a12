"""The hqq package against our `hqq`: the same half-quadratic steps in float32.

The package multiplies by inverse scales where we divide: numbers differ by a few roundings of float32, 2^-24 relative. A code
differs where w / s + z lies that close to a half; of the 5 million weights a few dozen do at most. Early stopping could turn such
a difference into another number of steps, and does not here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.scheme import WeightScheme
from tests.toolkits.both import agreement, divergence, needs, quantize, weights

pytestmark = needs("hqq")


@pytest.mark.parametrize(
    ("scheme", "axis"),
    [(weights(4, 64), 1), (weights(3, 64), 1), (weights(2, 64), 0), (weights(8), 1), (weights(4, 64), 0)],
    ids=["w4_g64", "w3_g64", "w2_g64_axis0", "w8_channel", "w4_g64_axis0"],
)
def test_codes_scales_and_zeros_are_ours(scheme: WeightScheme, axis: int, tmp_path: Path) -> None:
    theirs = quantize(tmp_path, scheme, "hqq_package", axis=axis)
    ours = quantize(tmp_path, scheme, "hqq", axis=axis)
    found = agreement(theirs, ours)
    assert found.equal > 0.9999
    assert found.most <= 1
    assert found.scale < 1e-6
    assert found.zero < 1e-3
    assert theirs.summary["toolkit"]["release"] == theirs.summary["toolkit"]["environment"]["packages"]["hqq"]
    assert theirs.summary["bits_stored"] == ours.summary["bits_stored"]
    a, b = divergence(theirs, ours)
    assert a == pytest.approx(b, rel=1e-3)


def test_without_the_search_it_is_the_min_max_grid(tmp_path: Path) -> None:
    theirs = quantize(tmp_path, weights(4, 64), "hqq_package", optimize=False)
    ours = quantize(tmp_path, weights(4, 64), "hqq", optimize=False)
    assert agreement(theirs, ours).equal > 0.9999
