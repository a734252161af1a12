"""MLflow changed by hand, out of order, out of date or out of reach: runs are put right, and the sweep never waits or fails."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.mlflow_setup import upgrade_sqlite
from orchestrator.results import SweepResult
from orchestrator.track import COOL_DOWN_S, MlflowTracker
from orchestrator.tracked_runs import SWEEP_RUN, Phase
from orchestrator.tracking import TrackingSettings
from tests.orchestrator.sweeping import ROOT
from tests.orchestrator.tracked_mlflow import client_of, dump, tracker_of
from tests.orchestrator.tracked_sweep import (
    KEY,
    fixed_delta,
    full_sweep,
)

pytestmark = pytest.mark.mlflow


@pytest.fixture
def sweep(tmp_path: Path) -> SweepResult:
    return full_sweep(tmp_path / "store")


def test_runs_deleted_by_hand_are_made_again_with_a_note(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    ids = tracker.sync(sweep, Phase.ENDED).run_ids
    client = client_of(mlflow_project)
    before = dump(client)
    client.delete_run(ids[SWEEP_RUN])
    client.delete_run(ids["v-rtn-w4"])
    again = tracker.sync(sweep, Phase.ENDED)
    assert again.created == 2
    assert again.failed is None
    assert [n for n in again.notes if "deleted by hand" in n]
    assert dump(client) == before
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


def test_a_sweep_that_is_renamed_renames_its_run(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    ids = tracker.sync(sweep, Phase.ENDED).run_ids
    assert tracker.sync(replace(sweep, name="mine"), Phase.ENDED).failed is None
    run = client_of(mlflow_project).get_run(ids[SWEEP_RUN])
    assert run.info.run_name == run.data.tags["mlflow.runName"] == f"mine {sweep.key[:8]}"
    assert tracker.sync(replace(sweep, name="mine"), Phase.ENDED).unchanged == 6


PREPARES = """
import sys, time
from pathlib import Path
from orchestrator.track import MlflowTracker
from orchestrator.tracking import TrackingSettings
import mlflow.tracking
print("ready", flush=True)
sys.stdin.readline()
said = MlflowTracker(TrackingSettings.of({"kind": "mlflow"}, Path.cwd())).prepare()
print(said or "well")
"""


def test_drivers_that_start_at_once_make_one_database(tmp_path: Path) -> None:
    """Of stores of their own, in one project folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    drivers = [subprocess.Popen([sys.executable, "-c", PREPARES], env=environment, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    assert [d.stdout.readline() for d in drivers] == ["ready\n"] * 3
    for driver in drivers:
        driver.stdin.write("go\n")
        driver.stdin.flush()
    assert [d.communicate()[0] for d in drivers] == ["well\n"] * 3


def test_a_deleted_experiment_is_restored_with_a_note(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    tracker.sync(sweep, Phase.ENDED)
    client = client_of(mlflow_project)
    before = dump(client)
    client.delete_experiment(client.get_experiment_by_name("bitgrid").experiment_id)
    assert dump(client) == {}
    again = tracker.sync(sweep, Phase.ENDED)
    assert any("restored" in n for n in again.notes)
    assert (again.created, again.unchanged) == (0, 6)
    assert dump(client) == before


def test_an_experiment_that_cannot_be_restored_gets_a_number(
    mlflow_project: Path, sweep: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    tracker = tracker_of(mlflow_project)
    tracker.sync(sweep, Phase.ENDED)
    client = client_of(mlflow_project)
    client.delete_experiment(client.get_experiment_by_name("bitgrid").experiment_id)

    def refuse(self: Any, experiment_id: str) -> None:
        raise MlflowException("not allowed")

    monkeypatch.setattr(MlflowClient, "restore_experiment", refuse)
    again = tracker.sync(sweep, Phase.ENDED)
    assert again.created == 6
    assert any("next name" in n for n in again.notes)
    assert client.get_experiment_by_name("bitgrid-2") is not None
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


def test_a_second_run_of_the_same_variant_is_removed(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    ids = tracker.sync(sweep, Phase.ENDED).run_ids
    client = client_of(mlflow_project)
    before = dump(client)
    twin = client.get_run(ids["v-rtn-w4"])
    lost = {k: v for k, v in twin.data.tags.items() if k != "bitgrid.content"}
    client.create_run(twin.info.experiment_id, 5, lost, twin.info.run_name)
    again = tracker.sync(sweep, Phase.ENDED)
    assert (again.created, again.unchanged) == (0, 6)
    assert dump(client) == before


def test_a_sync_cut_off_anywhere_is_completed_by_the_next(
    mlflow_project: Path, sweep: SweepResult, tmp_path: Path, empty_mlflow: Path
) -> None:
    """Every call that changes MLflow fails once, in a sync of its own."""
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(empty_mlflow, whole / "mlflow.db")
    tracker_of(whole).sync(sweep, Phase.ENDED)
    wanted = dump(client_of(whole))

    class Flaky:
        """A client whose n-th change raises; nothing else differs."""

        def __init__(self, client: Any, fails_at: int) -> None:
            self.client, self.left = client, fails_at

        def __getattr__(self, name: str) -> Any:
            method = getattr(self.client, name)
            if name not in ("create_run", "log_batch", "log_artifacts", "set_terminated"):
                return method

            def call(*args: Any, **kwargs: Any) -> Any:
                self.left -= 1
                if self.left == 0:
                    raise ConnectionError("cut off")
                return method(*args, **kwargs)

            return call

    for n in range(1, 9):
        tracker = tracker_of(mlflow_project)
        assert tracker.prepare() is None
        tracker._client = Flaky(tracker._client, n)
        cut = tracker.sync(sweep, Phase.ENDED)
        assert cut.failed is not None
        assert f"bitgrid reconcile {KEY[:12]}" in cut.failed
    assert tracker_of(mlflow_project).sync(sweep, Phase.ENDED).failed is None
    assert dump(client_of(mlflow_project)) == wanted


def test_the_breaker_keeps_a_dead_server_from_holding_the_sweep(sweep: SweepResult, tmp_path: Path) -> None:
    now = [0.0]
    settings = TrackingSettings.of({"kind": "mlflow_server", "uri": "http://127.0.0.1:9", "timeout_s": 1}, tmp_path)
    tracker = MlflowTracker(settings, fixed_delta, clock=lambda: now[0])
    opened = []
    original = tracker._open

    def counted() -> None:
        opened.append(now[0])
        original()

    tracker._open = counted  # type: ignore[method-assign]
    reason = tracker.prepare()
    assert reason is not None
    assert "127.0.0.1:9" in reason
    for _ in range(3):
        assert f"bitgrid reconcile {KEY[:12]}" in str(tracker.sync(sweep, Phase.RUNNING).failed)
    assert opened == [0.0]
    now[0] = COOL_DOWN_S
    assert tracker.sync(sweep, Phase.RUNNING).failed
    assert opened == [0.0, COOL_DOWN_S]


def test_an_unwritable_database_is_reported_at_once(tmp_path: Path, sweep: SweepResult) -> None:
    (tmp_path / "mlflow.db").mkdir()
    tracker = tracker_of(tmp_path)
    assert "mlflow.db" in str(tracker.prepare())
    assert "reconcile" in str(tracker.sync(sweep, Phase.ENDED).failed)


def test_a_database_removed_beside_a_sweep_is_told_in_a_line(
    mlflow_project: Path, sweep: SweepResult, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = tracker_of(mlflow_project)
    assert tracker.sync(sweep, Phase.RUNNING).failed is None
    (mlflow_project / "mlflow.db").unlink()
    capfd.readouterr()
    assert "mlflow.db" in str(tracker.sync(replace(sweep, name="mine"), Phase.ENDED).failed)
    assert capfd.readouterr() == ("", "")


def test_a_database_that_had_no_room_for_its_tables_is_made_when_there_is(tmp_path: Path, sweep: SweepResult) -> None:
    resource = pytest.importorskip("resource")  # no Windows
    project = tmp_path / "project"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # answers as a full disk does
    try:
        assert "mlflow.db" in str(tracker_of(project).sync(sweep, Phase.ENDED).failed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    made = tracker_of(project).sync(sweep, Phase.ENDED)
    assert made.failed is None
    assert made.created == 6


def test_a_refused_run_does_not_stop_the_others(mlflow_project: Path, sweep: SweepResult, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.tracking import MlflowClient

    create = MlflowClient.create_run

    def refuse_one(self: Any, experiment: str, start: int, tags: Any, name: str) -> Any:
        if name.endswith("rtn · w4"):
            raise MlflowException("no such thing", INVALID_PARAMETER_VALUE)
        return create(self, experiment, start, tags, name)

    monkeypatch.setattr(MlflowClient, "create_run", refuse_one)
    done = tracker_of(mlflow_project).sync(sweep, Phase.ENDED)
    assert done.created == 5
    assert "rtn · w4: no such thing" in str(done.failed)


def test_a_budget_leaves_the_rest_to_the_next_sync(mlflow_project: Path, sweep: SweepResult) -> None:
    settings = TrackingSettings.of({"kind": "mlflow"}, mlflow_project)
    ticks = iter(range(10_000))
    tracker = MlflowTracker(settings, fixed_delta, clock=lambda: float(next(ticks)))
    first = tracker.sync(sweep, Phase.ENDED, budget_s=2.5)
    assert (first.created, first.left, first.complete) == (3, 3, False)
    assert tracker.sync(sweep, Phase.ENDED).created == 3


def older_database(file: Path) -> str:
    """A database as the MLflow of one migration ago left it; its newest revision."""
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    config = _get_alembic_config(str(engine.url))
    script = ScriptDirectory.from_config(config)
    head = script.get_current_head()
    assert head is not None
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, str(script.get_revision(head).down_revision))
    engine.dispose()
    return head


def revision_of(file: Path) -> str:
    with closing(sqlite3.connect(file)) as db:
        return str(db.execute("select version_num from alembic_version").fetchone()[0])


def test_an_older_database_is_upgraded_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    head = older_database(file)
    old = revision_of(file)
    assert "upgraded" in upgrade_sqlite(file)
    assert revision_of(file) == head
    (kept,) = tmp_path.glob("mlflow.db.*.bak")
    assert revision_of(kept) == old
    assert tracker_of(tmp_path).prepare() is None


def test_a_database_of_a_newer_mlflow_is_left_alone(mlflow_project: Path, sweep: SweepResult) -> None:
    file = mlflow_project / "mlflow.db"
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("update alembic_version set version_num = 'ffffffffffff'")
    assert "another version of MLflow" in str(tracker_of(mlflow_project).sync(sweep, Phase.ENDED).failed)
    assert revision_of(file) == "ffffffffffff"
    assert [p.name for p in mlflow_project.iterdir()] == ["mlflow.db"]
