"""The table of kernels: what is asked for is what runs."""

from __future__ import annotations

import pytest

from quant.kernels import TABLE, kernel, preferring, recorded
from workers.request import BACKENDS


def test_a_preferred_backend_is_what_auto_means_where_there_is_one() -> None:
    with preferring("reference"), recorded() as ran:
        for operation in TABLE:
            assert (kernel(operation).backend == "reference") is ("reference" in TABLE[operation])
        assert kernel("gptq_block", "torch").backend == "torch"
    assert set(ran) == set(TABLE)
    assert kernel("gptq_block").backend == next(b for b in TABLE["gptq_block"] if b not in ("cuda", "triton"))
    with preferring("cuda"), pytest.raises(RuntimeError, match="backend cuda of gptq_block does not work on cpu"):
        kernel("gptq_block")


def test_backends_are_those_of_the_table() -> None:
    assert set(BACKENDS) == {"auto", *(name for row in TABLE.values() for name in row)}
