"""The hqq package against our `hqq`: the same half-quadratic steps in float32.

The package multiplies by inverse scales where we divide: numbers differ by a few roundings of float32, 2^-24 relative, and a code where
w / s + z lies that close to a half. Float16 weights lie on a lattice, so that a few do. A code that falls the other way in a step of
the search moves its group's zero, a mean over the group, by 1 / g; with 4 bits zeros are rounded first, and one at a half starts a
whole code apart. That touches less than one group in a hundred; in all others codes are equal, and over all of them a group
that starts apart still has most codes equal, or off by one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.scheme import WeightScheme
from tests.toolkits.both import agreement, needs, quantize, weights

pytestmark = needs("hqq")


@pytest.mark.parametrize(
    ("scheme", "params"),
    [
        (weights(4, 64), {"axis": 1}),
        (weights(3, 64), {"axis": 1}),
        (weights(2, 64), {"axis": 0}),
        (weights(8), {"axis": 1}),
        (weights(4, 64), {"axis": 1, "optimize": False}),
    ],
    ids=["w4_g64", "w3_g64", "w2_g64_axis0", "w8_channel", "w4_g64_min_max"],
)
def test_codes_scales_and_zeros_are_ours(scheme: WeightScheme, params: dict[str, int], tmp_path: Path) -> None:
    theirs = quantize(tmp_path, scheme, "hqq_package", **params)
    ours = quantize(tmp_path, scheme, "hqq", **params)
    found = agreement(theirs, ours)
    assert found.scale < 1e-6
    assert found.most <= 1
    assert found.zeros > 0.99
    assert found.equal_there > 0.9999
    assert found.equal > 0.999
    assert theirs.summary["toolkit"]["release"] == theirs.summary["toolkit"]["environment"]["packages"]["hqq"]
    assert theirs.summary["bits_stored"] == ours.summary["bits_stored"]
