"""The ledger: what it tells, and beside a driver at work."""

from __future__ import annotations

from pathlib import Path

from orchestrator.ledger import Ledger, read_durations


def test_a_ledger_in_use_is_read_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.add_duration("key", "evaluate", "model", "task", 3.0)
        ledger._connection.execute("BEGIN IMMEDIATE")
        assert read_durations(path) == {("evaluate", "model", "task"): 3.0}
        ledger._connection.rollback()
    path.write_bytes(b"no database" * 100)
    assert read_durations(path) == {}
    assert path.read_bytes() == b"no database" * 100
    assert read_durations(tmp_path / "absent") == {}


def test_an_estimate_is_the_mean_of_the_latest_20_stages_of_its_kind(tmp_path: Path) -> None:
    """One that ran again counts with its last time alone, as the latest."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for n in range(25):
            ledger.add_duration(f"key {n}", "quantize", "model", "gptq", 2.0**n)
        ledger.add_duration("key 2", "quantize", "model", "gptq", 0.0)
        ledger.add_duration("another", "quantize", "model", "rtn", 1.5)
        told = ledger.durations()
    # Of 20, the 19 from the 6th on and 0: a sum of powers of two is exact.
    assert told == {("quantize", "model", "gptq"): (2**25 - 2**6) / 20, ("quantize", "model", "rtn"): 1.5}


def test_what_a_tracker_was_told_is_of_its_sweep_and_outlives_the_driver(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        assert ledger.flushed("sweep", "mlflow") is None
        for digest in ("first", "second"):
            ledger.set_flushed("sweep", "mlflow", digest)
        ledger.set_flushed("sweep", "other", "third")
    with Ledger(path) as ledger:
        assert [ledger.flushed(*k) for k in (("sweep", "mlflow"), ("sweep", "other"), ("mlflow", "sweep"))] == ["second", "third", None]


def test_a_broken_ledger_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database" * 100)
    with Ledger(path) as ledger:
        ledger.add_duration("key", "evaluate", "model", "task", 3.0)
    assert read_durations(path) == {("evaluate", "model", "task"): 3.0}
