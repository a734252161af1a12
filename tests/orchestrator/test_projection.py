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


def finish(project: Path, ledger: Ledger, result: SweepResult, **settings: Any) -> SyncReport:
    """The end of a run whose process has not opened MLflow yet."""
    return Projection({"kind": "mlflow", **settings}, project, ledger, lambda: result).finish(result, {})


def counts(report: SyncReport) -> tuple[int, int, int]:
    assert report.failed is None
    return report.created, report.updated, report.unchanged


def test_what_is_there_is_not_even_opened(
    mlflow_project: Path, ledger: Ledger, sweep: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = started(sweep, 4)  # of some variants there is nothing to say
    assert counts(finish(mlflow_project, ledger, partial)) == (3, 0, 0)

    def refuse(self: MlflowTracker) -> None:
        raise AssertionError("MLflow was opened")

    monkeypatch.setattr(MlflowTracker, "_open", refuse)
    assert counts(finish(mlflow_project, ledger, partial)) == (0, 0, 3)


def test_a_database_that_another_sweep_made_anew_is_written(
    mlflow_project: Path, empty_mlflow: Path, tmp_path: Path, ledger: Ledger, sweep: SweepResult
) -> None:
    finish(mlflow_project, ledger, sweep)
    # As after deleting it: a new file, for this process may hold the old one open.
    shutil.copy(empty_mlflow, mlflow_project / "new.db")
    (mlflow_project / "new.db").replace(mlflow_project / "mlflow.db")
    assert counts(finish(mlflow_project, ledger, full_sweep(tmp_path / "other", key="abcd" * 16))) == (6, 0, 0)
    assert counts(finish(mlflow_project, ledger, sweep)) == (6, 0, 0)
    assert counts(finish(mlflow_project, ledger, sweep)) == (0, 0, 6)


@pytest.mark.parametrize(("key", "wanted"), [(SWEEP_RUN, (1, 5, 0)), ("v-rtn-w4", (1, 0, 5))])
def test_a_run_deleted_by_hand_is_made_again(
    mlflow_project: Path, ledger: Ledger, sweep: SweepResult, key: str, wanted: tuple[int, int, int]
) -> None:
    ids = finish(mlflow_project, ledger, sweep).run_ids
    client_of(mlflow_project).delete_run(ids[key])
    again = finish(mlflow_project, ledger, sweep)
    assert counts(again) == wanted
    assert any("deleted by hand" in n for n in again.notes)
    assert counts(finish(mlflow_project, ledger, sweep)) == (0, 0, 6)


def test_a_server_is_asked_and_believed_where_it_does_not_answer(
    mlflow_project: Path, ledger: Ledger, sweep: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stood in for by a database: only the address is a server's."""
    server = {"kind": "mlflow_server", "uri": "http://mlflow.example", "artifact_location": (mlflow_project / "mlartifacts").as_uri()}

    def reached(self: MlflowTracker) -> None:
        self._client = client_of(mlflow_project)

    def lost(self: MlflowTracker) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(MlflowTracker, "_open", reached)
    ids = finish(mlflow_project, ledger, sweep, **server).run_ids
    assert counts(finish(mlflow_project, ledger, sweep, **server)) == (0, 0, 6)
    client_of(mlflow_project).delete_run(ids["v-rtn-w4"])
    with monkeypatch.context() as away:
        away.setattr(MlflowTracker, "_open", lost)
        assert counts(finish(mlflow_project, ledger, sweep, **server)) == (0, 0, 6)
    assert counts(finish(mlflow_project, ledger, sweep, **server)) == (1, 0, 5)


def test_looking_into_a_database_imports_no_mlflow(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker_of(mlflow_project).sync(sweep, Phase.ENDED)
    code = (
        "import sys; from pathlib import Path; from orchestrator.track import open_tracker\n"
        f"t = open_tracker({{'kind': 'mlflow'}}, Path({str(mlflow_project)!r}))\n"
        f"print(*sorted(t.runs_of({KEY!r})), len(t.runs_of('f00d')), 'mlflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert out.stdout.split() == [*sorted({SWEEP_RUN, *(v.key for v in sweep.variants)}), "0", "False"]


def test_files_left_out_are_uploaded_once_they_are_wanted(mlflow_project: Path, ledger: Ledger, sweep: SweepResult) -> None:
    assert counts(finish(mlflow_project, ledger, sweep, log_artifacts=False)) == (6, 0, 0)
    client = client_of(mlflow_project)
    bare = dump(client)
    assert {r["tags"]["bitgrid.artifacts"] for r in bare.values()} == {"{}"}
    assert not any(r["files"] for r in bare.values())
    assert counts(finish(mlflow_project, ledger, sweep)) == (0, 6, 0)
    assert all(r["files"] and r["tags"]["bitgrid.artifacts"] != "{}" for r in dump(client).values())


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
