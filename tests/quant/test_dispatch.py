"""The table of kernels: what is asked for is what runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from quant.errors import BackendError
from quant.kernels import TABLE, kernel, noted, preferring, recorded
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


def test_faster_twins_are_passed_over_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not work is not asked what it takes; what is for another device is not even imported; each is told once."""
    twins = {
        "broken": SimpleNamespace(unavailable=lambda device: f"no library on {device}", refuses=lambda rows: pytest.fail("it was asked")),
        "choosy": SimpleNamespace(unavailable=lambda device: None, refuses=lambda rows: "too many rows" if rows > 8 else None),
        "reference": SimpleNamespace(),
    }
    for name, twin in twins.items():
        monkeypatch.setitem(sys.modules, f"twin_{name}", twin)
    monkeypatch.setitem(TABLE, "made_up", {"cuda": "not.there", **{name: f"twin_{name}" for name in twins}})
    first, second = "made_up runs slower: no library on cpu", "made_up runs slower: too many rows"
    with recorded() as ran, noted() as told:
        for given, backend, notes in (
            ({}, "choosy", [first]),
            ({"rows": 8}, "choosy", [first]),
            ({"rows": 9}, "reference", [first, second]),
        ):
            chosen = kernel("made_up", **given)
            assert (chosen.run, chosen.backend, chosen.notes) == (twins[backend], backend, notes)
        with pytest.raises(BackendError, match=r"choosy of made_up .* on cpu: too many rows; choose backend=auto or broken or reference$"):
            kernel("made_up", "choosy", rows=9)
    assert (ran, told) == ({"made_up": ["choosy", "reference"]}, [first, second])
