"""The MLflow projection, against real MLflow databases."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.results import SweepResult
from orchestrator.stage import Status
from orchestrator.track import open_tracker
from orchestrator.tracked_runs import SWEEP_RUN, Phase
from orchestrator.tracking import NoTracker
from tests.orchestrator.tracked_mlflow import client_of, dump, runs_of, tracker_of
from tests.orchestrator.tracked_sweep import (
    KEY,
    change,
    committed,
    failed,
    full_sweep,
    started,
    variant,
    with_failure,
)

pytestmark = pytest.mark.mlflow


@pytest.fixture
def sweep(tmp_path: Path) -> SweepResult:
    return full_sweep(tmp_path / "store")


def test_two_levels_with_axes_scores_intervals_and_artifacts(mlflow_project: Path, sweep: SweepResult) -> None:
    report = mlflow_project / "report.html"
    report.write_text("<p>report</p>")
    done = tracker_of(mlflow_project).sync(sweep, Phase.ENDED, {"report.html": report, "absent.html": mlflow_project / "absent"})
    assert (done.created, done.updated, done.unchanged, done.failed, done.notes) == (6, 0, 0, None, ())
    assert set(done.run_ids) == {SWEEP_RUN, *(v.key for v in sweep.variants)}
    runs = dump(client_of(mlflow_project))
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


def test_writing_twice_changes_nothing(mlflow_project: Path, sweep: SweepResult) -> None:
    sweep = with_failure(sweep)
    tracker_of(mlflow_project).sync(sweep, Phase.ENDED)
    before = dump(client_of(mlflow_project))
    again = tracker_of(mlflow_project).sync(sweep, Phase.ENDED)
    assert (again.created, again.updated, again.unchanged) == (0, 0, 6)
    assert dump(client_of(mlflow_project)) == before
    forced = tracker_of(mlflow_project).reconcile(sweep, Phase.ENDED)
    assert (forced.created, forced.updated, forced.unchanged) == (0, 6, 0)
    assert dump(client_of(mlflow_project)) == before


def test_a_sweep_followed_live_equals_one_written_at_the_end(
    mlflow_project: Path, tmp_path: Path, sweep: SweepResult, empty_mlflow: Path
) -> None:
    sweep = with_failure(sweep)
    tracker = tracker_of(mlflow_project)
    names = set()
    for done in (0, 1, 4, 5, 9, 12):
        tracker.sync(started(sweep, done), Phase.RUNNING)
        live = dump(client_of(mlflow_project))
        assert live[f"/synthetic {KEY[:8]}"]["status"] == "RUNNING"
        assert names <= set(live)
        names = set(live)
    tracker.sync(sweep, Phase.ENDED)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_mlflow, other / "mlflow.db")
    tracker_of(other).sync(sweep, Phase.ENDED)
    assert dump(client_of(mlflow_project)) == dump(client_of(other))


def test_a_resumed_sweep_keeps_its_run(mlflow_project: Path, tmp_path: Path, sweep: SweepResult, empty_mlflow: Path) -> None:
    tracker = tracker_of(mlflow_project)
    stopped = tracker.sync(started(sweep, 4), Phase.ENDED)
    seen = [stopped, tracker.sync(started(sweep, 5), Phase.RUNNING), tracker.sync(sweep, Phase.ENDED)]
    assert {s.run_ids[SWEEP_RUN] for s in seen} == {stopped.run_ids[SWEEP_RUN]}
    assert [s.notes for s in seen] == [()] * 3
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_mlflow, other / "mlflow.db")
    tracker_of(other).sync(sweep, Phase.ENDED)
    assert dump(client_of(mlflow_project)) == dump(client_of(other))


def test_failed_runs_say_why_and_recover_on_resume(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    tracker.sync(with_failure(sweep), Phase.ENDED)
    runs = dump(client_of(mlflow_project))
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
    run = dump(client_of(mlflow_project))[f"{parent}/tiny · gptq · w2"]
    assert run["status"] == "FINISHED"
    assert not [t for t in run["tags"] if t.startswith("bitgrid.error")]
    assert "mlflow.note.content" not in run["tags"]


def test_what_an_interrupted_sweep_left_undone_is_killed(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker_of(mlflow_project).sync(started(sweep, 4), Phase.ENDED)
    runs = dump(client_of(mlflow_project))
    parent = f"synthetic {KEY[:8]}"
    assert {k: r["status"] for k, r in runs.items()} == {
        f"/{parent}": "KILLED",
        f"{parent}/tiny · unquantized": "FINISHED",
        f"{parent}/tiny · rtn · w4": "KILLED",
    }


def test_a_deleted_database_is_rebuilt_the_same(mlflow_project: Path, sweep: SweepResult, empty_mlflow: Path) -> None:
    sweep = with_failure(sweep)
    tracker = tracker_of(mlflow_project)
    tracker.sync(sweep, Phase.ENDED)
    before = dump(client_of(mlflow_project))
    tracker.close()
    (mlflow_project / "mlflow.db").unlink()
    shutil.rmtree(mlflow_project / "mlartifacts")
    shutil.copy(empty_mlflow, mlflow_project / "mlflow.db")
    tracker_of(mlflow_project).reconcile(sweep, Phase.ENDED)
    assert dump(client_of(mlflow_project)) == before


def test_a_recomputed_artifact_leaves_no_old_points_behind(mlflow_project: Path, tmp_path: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    tracker.sync(sweep, Phase.ENDED)
    old = variant(sweep, "v-rtn-w4").evaluations
    new = committed(tmp_path / "store", "evaluate", old["text"].key, 1_700_009_000.0, {"scores": {"perplexity": 6.75}}, {})
    sweep = change(sweep, "v-rtn-w4", evaluations={**old, "text": new})
    again = tracker.sync(sweep, Phase.ENDED)
    assert again.failed is None
    assert any("made again" in n for n in again.notes)
    run = dump(client_of(mlflow_project))[f"synthetic {KEY[:8]}/tiny · rtn · w4"]
    assert run["metrics"]["eval/text/perplexity"] == [(6.75, 0, 1_700_009_010_500)]
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


def test_what_a_person_adds_to_a_run_stays(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    tracker.sync(with_failure(sweep), Phase.ENDED)
    client = client_of(mlflow_project)
    run = next(r for r in runs_of(client) if r.data.tags.get("bitgrid.variant_key") == "v-gptq-w2")
    client.set_tag(run.info.run_id, "verdict", "keep")
    client.log_metric(run.info.run_id, "mine", 3.0)
    tracker.sync(sweep, Phase.ENDED)
    kept = client.get_run(run.info.run_id)
    assert kept.data.tags["verdict"] == "keep"
    assert kept.data.metrics["mine"] == 3.0
    assert kept.info.status == "FINISHED"


def test_artifacts_can_be_left_out(mlflow_project: Path, sweep: SweepResult) -> None:
    tracker_of(mlflow_project, log_artifacts=False).sync(sweep, Phase.ENDED)
    assert not any(r["files"] for r in dump(client_of(mlflow_project)).values())


def test_sweeps_share_an_experiment_and_keep_apart(mlflow_project: Path, tmp_path: Path, sweep: SweepResult) -> None:
    tracker = tracker_of(mlflow_project)
    tracker.sync(sweep, Phase.ENDED)
    other = replace(full_sweep(tmp_path / "other", key="abcd" * 16), name="other")
    assert tracker.sync(other, Phase.ENDED).created == 6
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6


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
        ({"kind": "mlflow", "experiment": None}, "experiment=None; give the experiment's name"),
        ({"kind": "mlflow", "timeout_s": None}, "timeout_s=None; give a positive number"),
        ({"kind": "mlflow", "timeout_s": 0}, "timeout_s=0; give a positive number"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        open_tracker(settings, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "mlflow_server", "uri": "https://ann:hunter2@mlflow.example"},
        {"kind": "mlflow_server", "uri": "http://hunter2@mlflow.example:5000/path"},
        {"kind": "mlflow_server", "uri": "postgresql://ann:hunter2@database/mlflow"},
        {"kind": "mlflow", "uri": "postgresql://ann:hunter2@database/mlflow"},
        {"kind": "mlflow", "artifact_location": "ftp://ann:hunter2@files/mlflow"},
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.*PGPASSWORD") as refused:
        open_tracker(settings, tmp_path)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "mlflow_server", "uri": "https://mlflow.example/a:b@c"},
        {"kind": "mlflow", "uri": "postgresql://ann@database/mlflow", "artifact_location": "wasbs://runs@account.example/mlflow"},
        {"kind": "mlflow", "uri": "sqlite:////home/a:b@c/mlflow.db"},
    ],
)
def test_an_address_without_a_password_is_taken(settings: dict[str, Any], tmp_path: Path) -> None:
    open_tracker(settings, tmp_path).close()


def test_long_values_and_odd_names_are_logged_and_said(mlflow_project: Path, tmp_path: Path, sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    long = failed(v.evaluations["text"], message="x" * 20_000)
    odd = committed(tmp_path / "store", "evaluate", "e-odd", 1_700_000_900.0, {"scores": {"acc,norm": 0.5, "a/../b": float("nan")}}, {})
    sweep = change(sweep, v.key, evaluations={"text": long, "odd[limit=3]#1": odd})
    tracker = tracker_of(mlflow_project)
    assert tracker.sync(sweep, Phase.ENDED).failed is None
    run = next(r for r in runs_of(client_of(mlflow_project)) if r.data.tags.get("bitgrid.variant_key") == v.key)
    assert run.info.status == "FAILED"
    assert run.data.tags["bitgrid.error_message"].endswith("(cut from 20000 characters)")
    assert run.data.metrics["eval/odd_limit=3__1/acc_norm".replace("=", "_")] == 0.5
    assert tracker.sync(sweep, Phase.ENDED).unchanged == 6
    assert Status.FAILED is variant(sweep, v.key).status
