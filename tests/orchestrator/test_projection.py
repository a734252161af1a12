"""When the last write of a sweep into MLflow may be left out: the ledger says that it was made, and MLflow still holds it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import projection
from orchestrator.ledger import Ledger
from orchestrator.projection import Projection
from orchestrator.results import SweepResult
from orchestrator.stage import Status
from orchestrator.track import MlflowTracker
from orchestrator.tracked_runs import SWEEP_RUN, Phase
from orchestrator.tracking import NoTracker, SyncReport
from tests.orchestrator.tracked_mlflow import client_of, dump, tracker_of
from tests.orchestrator.tracked_sweep import KEY, full_sweep, started

pytestmark = pytest.mark.mlflow


@pytest.fixture
def sweep(tmp_path: Path) -> SweepResult:
    return full_sweep(tmp_path / "store")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def test_notes_of_syncs_beside_the_sweep_are_told_at_its_end(
    tmp_path: Path, ledger: Ledger, sweep: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()

    class Tracker(NoTracker):
        def sync(self, result: SweepResult, phase: Phase, *_: Any, **__: Any) -> SyncReport:
            synced.set()
            return SyncReport(notes=("two runs of one variant",) if phase is Phase.RUNNING else ())

    monkeypatch.setattr(projection, "INTERVAL_S", 0.01)
    monkeypatch.setattr(projection, "open_tracker", lambda *_: Tracker())
    following = Projection({"kind": "none"}, tmp_path, ledger, lambda: sweep)
    following.start()
    following.status(next(iter(sweep.stages.values())), Status.SUCCEEDED, None)  # type: ignore[arg-type]
    assert synced.wait(60)
    assert following.finish(sweep, {}).notes == ("two runs of one variant",)
