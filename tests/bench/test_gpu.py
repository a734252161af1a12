"""The benchmark of kernels on GPUs runs without one, small, in Triton's interpreter: every result right, and nothing claimed about
speed."""

from __future__ import annotations

import pytest

from bench.gpu import PIECES
from bench.on_gpu.clock import Bench, Ceilings
from quant.kernels.on_triton import interpreted

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not 1: nothing runs without a GPU")


@pytest.mark.parametrize("piece", list(PIECES))
def test_a_piece(piece: str) -> None:
    rows = list(PIECES[piece](Bench(dry=True)))
    assert rows
    for row in rows:
        assert row.error <= row.allowed, row
        assert row.ours_us is None
        assert " us" not in row.line(Ceilings())
