"""The MLflow projection, against real MLflow databases."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.mlflow_setup import upgrade_sqlite
from orchestrator.results import SweepResult
from orchestrator.stage import Status
from orchestrator.track import COOL_DOWN_S, MlflowTracker, open_tracker
from orchestrator.tracked_runs import SWEEP_RUN, Phase
from orchestrator.tracking import NoTracker, TrackingSettings
from tests.orchestrator.tracked_sweep import (
    KEY,
    change,
    committed,
    failed,
    fixed_delta,
    full_sweep,
    started,
    variant,
    with_failure,
)

pytestmark = pytest.mark.mlflow

INTERNAL = ("mlflow.parentRunId", "mlflow.user")


@pytest.fixture
def project(tmp_path: Path, empty_mlflow: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> SweepResult:
    return full_sweep(tmp_path / "store")


def tracker_of(project: Path, **settings: Any) -> MlflowTracker:
    return MlflowTracker(TrackingSettings.of({"kind": "mlflow", **settings}, project), fixed_delta)


def client_of(project: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{project / 'mlflow.db'}")


def runs_of(client: Any, view: int = 1) -> list[Any]:
    experiments = [e.experiment_id for e in client.search_experiments(view_type=3)]
    return list(client.search_runs(experiments, run_view_type=view, max_results=1000))


def dump(client: Any, artifacts: Path | None = None) -> dict[str, Any]:
    """Everything that "the same runs" means, by the parent's and the run's own name."""
    runs = runs_of(client)
    names = {r.info.run_id: r.info.run_name for r in runs}
    out = {}
    for run in runs:
        history = {
            key: sorted((m.value, m.step, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics
        }
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        files = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}
        parent = names.get(run.data.tags.get("mlflow.parentRunId", ""), "")
        out[f"{parent}/{run.info.run_name}"] = {
            "status": run.info.status,
            "start": run.info.start_time,
            "end": run.info.end_time,
            "params": run.data.params,
            "metrics": history,
            "tags": {k: v for k, v in run.data.tags.items() if k not in INTERNAL},
            "files": files,
        }
    assert len(out) == len(runs)
    return out


def test_two_levels_with_axes_scores_intervals_and_artifacts(project: Path, sweep: SweepResult) -> None:
    report = project / "report.html"
    report.write_text("<p>report</p>")
    done = tracker_of(project).sync(sweep, Phase.ENDED, {"report.html": report, "absent.html": project / "absent"})
    assert (done.created, done.updated, done.unchanged, done.failed, done.notes) == (6, 0, 0, None, ())
    assert set(done.run_ids) == {SWEEP_RUN, *(v.key for v in sweep.variants)}
    runs = dump(client_of(project))
    parent = f"synthetic {KEY[:8]}"
    assert set(runs) == {f"/{parent}", *(f"{parent}/{v.label}" for v in sweep.variants)}
    assert {"report.html", "config/sweep.yaml", "config/provenance.yaml"} == set(runs[f"/{parent}"]["files"])
    run = runs[f"{parent}/tiny · gptq · w2"]
    assert run["status"] == "FINISHED"
    assert run["params"] == {
        "model.name": "tiny",
        "model.dtype": "float32",
        "quant.method": "gptq",
        "quant.scheme": "w2",
        "quant.bits": "2",
        "quant.group_size": "64",
        "quant.symmetric": "false",
        "calibration.name": "self",
        "replicate": "r0",
    }
    text, base = variant(sweep, "v-gptq-w2").evaluations["text"], variant(sweep, "v-base").evaluations["text"]
    assert text.record is not None
    assert base.record is not None
    at = round(text.record["ended"] * 1000)
    assert run["metrics"]["eval/text/perplexity"] == [(6.5, 0, at)]
    assert run["metrics"]["delta/text/perplexity"] == [(0.5, 0, at)]
    assert run["metrics"]["delta/text/perplexity_low"] == [(0.0, 0, at)]
    assert run["metrics"]["delta/text/perplexity_high"] == [(1.0, 0, at)]
    assert run["metrics"]["size/bits_stored"][0][0] == 2.25
    assert [(v, s) for v, s, _ in run["metrics"]["layer/weight_error"]] == [(pytest.approx(0.01 * (i + 1)), i) for i in range(3)]
    assert "tables/quantize/layers.parquet" in run["files"]
    assert "tables/evaluate/text/table.json" in run["files"]
    assert "stages/quantize.json" in run["files"]
    assert not any(name.endswith(".safetensors") for name in run["files"])
    assert not any(name.startswith("delta/") for name in runs[f"{parent}/tiny · unquantized"]["metrics"])


def test_writing_twice_changes_nothing(project: Path, sweep: SweepResult) -> None:
    sweep = with_failure(sweep)
    tracker_of(project).sync(sweep, Phase.ENDED)
    before = dump(client_of(project))
    again = tracker_of(project).sync(sweep, Phase.ENDED)
    assert (again.created, again.updated, again.unchanged) == (0, 0, 6)
    assert dump(client_of(project)) == before
    forced = tracker_of(project).reconcile(sweep, Phase.ENDED)
    assert (forced.created, forced.updated, forced.unchanged) == (0, 6, 0)
    assert dump(client_of(project)) == before


def test_a_sweep_followed_live_equals_one_written_at_the_end(project: Path, tmp_path: Path, sweep: SweepResult, empty_mlflow: Path) -> None:
    sweep = with_failure(sweep)
    tracker = tracker_of(project)
    names = set()
    for done in (0, 1, 4, 5, 9, 12):
        tracker.sync(started(sweep, done), Phase.RUNNING)
        live = dump(client_of(project))
        assert live[f"/synthetic {KEY[:8]}"]["status"] == "RUNNING"
        assert names <= set(live)
        names = set(live)
    tracker.sync(sweep, Phase.ENDED)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_mlflow, other / "mlflow.db")
    tracker_of(other).sync(sweep, Phase.ENDED)
    assert dump(client_of(project)) == dump(client_of(other))


def test_failed_runs_say_why_and_recover_on_resume(project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(project)
    tracker.sync(with_failure(sweep), Phase.ENDED)
    runs = dump(client_of(project))
    parent = f"synthetic {KEY[:8]}"
    assert runs[f"/{parent}"]["status"] == "FAILED"
    run = runs[f"{parent}/tiny · gptq · w2"]
    assert run["status"] == "FAILED"
    assert run["tags"]["bitgrid.error_class"] == "numerical"
    assert run["tags"]["bitgrid.error_message"] == "the Hessian is not positive definite"
    assert "line 2" in run["tags"]["mlflow.note.content"]
    assert run["params"]["quant.bits"] == "2"
    assert run["end"] == 1_700_000_500_250
    resumed = tracker.sync(sweep, Phase.ENDED)
    assert (resumed.created, resumed.updated, resumed.unchanged) == (0, 2, 4)
    run = dump(client_of(project))[f"{parent}/tiny · gptq · w2"]
    assert run["status"] == "FINISHED"
    assert not [t for t in run["tags"] if t.startswith("bitgrid.error")]
    assert "mlflow.note.content" not in run["tags"]


def test_what_an_interrupted_sweep_left_undone_is_killed(project: Path, sweep: SweepResult) -> None:
    tracker_of(project).sync(started(sweep, 4), Phase.ENDED)
    runs = dump(client_of(project))
    parent = f"synthetic {KEY[:8]}"
    assert {k: r["status"] for k, r in runs.items()} == {
        f"/{parent}": "KILLED",
        f"{parent}/tiny · unquantized": "FINISHED",
        f"{parent}/tiny · rtn · w4": "KILLED",
    }


def test_a_deleted_database_is_rebuilt_the_same(project: Path, sweep: SweepResult, empty_mlflow: Path) -> None:
    sweep = with_failure(sweep)
    tracker = tracker_of(project)
    tracker.sync(sweep, Phase.ENDED)
    before = dump(client_of(project))
    tracker.close()
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")
    shutil.copy(empty_mlflow, project / "mlflow.db")
    tracker_of(project).reconcile(sweep, Phase.ENDED)
    assert dump(client_of(project)) == before


def test_runs_deleted_by_hand_are_made_again_with_a_note(project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(project)
    ids = tracker.sync(sweep, Phase.ENDED).run_ids
    client = client_of(project)
    before = dump(client)
    client.delete_run(ids[SWEEP_RUN])
    client.delete_run(ids["v-rtn-w4"])
    again = tracker.sync(sweep, Phase.ENDED)
    assert again.created == 2
    assert again.failed is None
    assert [n for n in again.notes if "deleted by hand" in n]
    assert dump(client) == before
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


def test_a_deleted_experiment_is_restored_with_a_note(project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(project)
    tracker.sync(sweep, Phase.ENDED)
    client = client_of(project)
    before = dump(client)
    client.delete_experiment(client.get_experiment_by_name("bitgrid").experiment_id)
    assert dump(client) == {}
    again = tracker.sync(sweep, Phase.ENDED)
    assert any("restored" in n for n in again.notes)
    assert (again.created, again.unchanged) == (0, 6)
    assert dump(client) == before


def test_an_experiment_that_cannot_be_restored_gets_a_number(project: Path, sweep: SweepResult, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    tracker = tracker_of(project)
    tracker.sync(sweep, Phase.ENDED)
    client = client_of(project)
    client.delete_experiment(client.get_experiment_by_name("bitgrid").experiment_id)

    def refuse(self: Any, experiment_id: str) -> None:
        raise MlflowException("not allowed")

    monkeypatch.setattr(MlflowClient, "restore_experiment", refuse)
    again = tracker.sync(sweep, Phase.ENDED)
    assert again.created == 6
    assert any("next name" in n for n in again.notes)
    assert client.get_experiment_by_name("bitgrid-2") is not None
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


def test_a_second_run_of_the_same_variant_is_removed(project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(project)
    ids = tracker.sync(sweep, Phase.ENDED).run_ids
    client = client_of(project)
    before = dump(client)
    twin = client.get_run(ids["v-rtn-w4"])
    lost = {k: v for k, v in twin.data.tags.items() if k != "bitgrid.content"}
    client.create_run(twin.info.experiment_id, 5, lost, twin.info.run_name)
    again = tracker.sync(sweep, Phase.ENDED)
    assert (again.created, again.unchanged) == (0, 6)
    assert dump(client) == before


def test_a_recomputed_artifact_leaves_no_old_points_behind(project: Path, tmp_path: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(project)
    tracker.sync(sweep, Phase.ENDED)
    old = variant(sweep, "v-rtn-w4").evaluations
    new = committed(tmp_path / "store", "evaluate", old["text"].key, 1_700_009_000.0, {"scores": {"perplexity": 6.75}}, {})
    sweep = change(sweep, "v-rtn-w4", evaluations={**old, "text": new})
    again = tracker.sync(sweep, Phase.ENDED)
    assert again.failed is None
    assert any("made again" in n for n in again.notes)
    run = dump(client_of(project))[f"synthetic {KEY[:8]}/tiny · rtn · w4"]
    assert run["metrics"]["eval/text/perplexity"] == [(6.75, 0, 1_700_009_010_500)]
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


def test_what_a_person_adds_to_a_run_stays(project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(project)
    tracker.sync(with_failure(sweep), Phase.ENDED)
    client = client_of(project)
    run = next(r for r in runs_of(client) if r.data.tags.get("bitgrid.variant_key") == "v-gptq-w2")
    client.set_tag(run.info.run_id, "verdict", "keep")
    client.log_metric(run.info.run_id, "mine", 3.0)
    tracker.sync(sweep, Phase.ENDED)
    kept = client.get_run(run.info.run_id)
    assert kept.data.tags["verdict"] == "keep"
    assert kept.data.metrics["mine"] == 3.0
    assert kept.info.status == "FINISHED"


def test_a_sync_cut_off_anywhere_is_completed_by_the_next(project: Path, sweep: SweepResult, tmp_path: Path, empty_mlflow: Path) -> None:
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
        tracker = tracker_of(project)
        assert tracker.prepare() is None
        tracker._client = Flaky(tracker._client, n)
        cut = tracker.sync(sweep, Phase.ENDED)
        assert cut.failed is not None
        assert f"bitgrid reconcile {KEY[:12]}" in cut.failed
    assert tracker_of(project).sync(sweep, Phase.ENDED).failed is None
    assert dump(client_of(project)) == wanted


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


def test_a_refused_run_does_not_stop_the_others(project: Path, sweep: SweepResult, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.tracking import MlflowClient

    create = MlflowClient.create_run

    def refuse_one(self: Any, experiment: str, start: int, tags: Any, name: str) -> Any:
        if name.endswith("rtn · w4"):
            raise MlflowException("no such thing", INVALID_PARAMETER_VALUE)
        return create(self, experiment, start, tags, name)

    monkeypatch.setattr(MlflowClient, "create_run", refuse_one)
    done = tracker_of(project).sync(sweep, Phase.ENDED)
    assert done.created == 5
    assert "rtn · w4: no such thing" in str(done.failed)


def test_a_budget_leaves_the_rest_to_the_next_sync(project: Path, sweep: SweepResult) -> None:
    settings = TrackingSettings.of({"kind": "mlflow"}, project)
    ticks = iter(range(10_000))
    tracker = MlflowTracker(settings, fixed_delta, clock=lambda: float(next(ticks)))
    first = tracker.sync(sweep, Phase.ENDED, budget_s=2.5)
    assert (first.created, first.left, first.complete) == (3, 3, False)
    assert tracker.sync(sweep, Phase.ENDED).created == 3


def test_artifacts_can_be_left_out(project: Path, sweep: SweepResult) -> None:
    tracker_of(project, log_artifacts=False).sync(sweep, Phase.ENDED)
    assert not any(r["files"] for r in dump(client_of(project)).values())


def test_sweeps_share_an_experiment_and_keep_apart(project: Path, tmp_path: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(project)
    tracker.sync(sweep, Phase.ENDED)
    other = replace(full_sweep(tmp_path / "other", key="abcd" * 16), name="other")
    assert tracker.sync(other, Phase.ENDED).created == 6
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


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


def test_a_database_of_a_newer_mlflow_is_left_alone(project: Path, sweep: SweepResult) -> None:
    file = project / "mlflow.db"
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("update alembic_version set version_num = 'ffffffffffff'")
    assert "another version of MLflow" in str(tracker_of(project).sync(sweep, Phase.ENDED).failed)
    assert revision_of(file) == "ffffffffffff"
    assert [p.name for p in project.iterdir()] == ["mlflow.db"]


def test_nothing_of_mlflow_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.track import open_tracker; import orchestrator.ui\n"
        f"t = open_tracker({{'kind': 'mlflow'}}, Path({str(tmp_path)!r})); t.close()\n"
        "print([m for m in ('mlflow', 'sqlalchemy', 'pandas', 'torch', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert out.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())


def test_no_tracking_writes_nothing(tmp_path: Path, sweep: SweepResult) -> None:
    tracker = open_tracker({"kind": "none"}, tmp_path)
    assert isinstance(tracker, NoTracker)
    assert tracker.prepare() is None
    assert tracker.sync(sweep, Phase.ENDED).complete
    assert tracker.reconcile(sweep, Phase.ENDED).complete
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "mlfow"}, "nearest: mlflow"),
        ({"kind": "mlflow", "urii": "x"}, "nearest: uri"),
        ({"kind": "mlflow_server", "uri": "sqlite:///x.db"}, "http://"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        open_tracker(settings, tmp_path)


def test_long_values_and_odd_names_are_logged_and_said(project: Path, tmp_path: Path, sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    long = failed(v.evaluations["text"], message="x" * 20_000)
    odd = committed(tmp_path / "store", "evaluate", "e-odd", 1_700_000_900.0, {"scores": {"acc,norm": 0.5, "a/../b": float("nan")}}, {})
    sweep = change(sweep, v.key, evaluations={"text": long, "odd[limit=3]#1": odd})
    tracker = tracker_of(project)
    assert tracker.sync(sweep, Phase.ENDED).failed is None
    run = next(r for r in runs_of(client_of(project)) if r.data.tags.get("bitgrid.variant_key") == v.key)
    assert run.info.status == "FAILED"
    assert run.data.tags["bitgrid.error_message"].endswith("(cut from 20000 characters)")
    assert run.data.metrics["eval/odd_limit=3__1/acc_norm".replace("=", "_")] == 0.5
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6
    assert Status.FAILED is variant(sweep, v.key).status
