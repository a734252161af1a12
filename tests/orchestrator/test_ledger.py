"""The ledger, beside a driver at work."""

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
