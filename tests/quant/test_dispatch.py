"""The table of kernels: what is asked for is what runs."""

from __future__ import annotations

import pytest

from quant.errors import BackendError
from quant.kernels import TABLE, kernel, preferring, recorded
from workers.request import BACKENDS


def test_a_preferred_backend_is_what_auto_means_where_there_is_one() -> None:
    with preferring("reference"), recorded() as ran:
        for operation in TABLE:
            assert (kernel(operation).backend == "reference") is ("reference" in TABLE[operation])
        assert kernel("gptq_block", "torch").backend == "torch"
    assert set(ran) == set(TABLE)
    assert kernel("gptq_block").backend == next(b for b in TABLE["gptq_block"] if b not in ("cuda", "triton"))


def test_a_backend_that_does_not_work_says_who_asked_and_what_does() -> None:
    said = "hints.backend=cuda: backend cuda of gptq_block does not work on cpu: .*CUDA tensors.*; choose hints.backend=auto or cpu or "
    with preferring("cuda", "hints.backend"):
        with pytest.raises(BackendError, match=said):
            kernel("gptq_block")
        with pytest.raises(BackendError, match=r"^backend cpu of kmeans_columns .*; choose backend=auto or torch or reference$"):
            kernel("kmeans_columns", "cpu", "meta")


def test_backends_are_those_of_the_table() -> None:
    assert set(BACKENDS) == {"auto", *(name for row in TABLE.values() for name in row)}
