"""Sweeps that were stopped, broken, moved away from, or run without tracking, and what the verbs make of them afterwards."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator import lease, run, verbs
from orchestrator.cli import main
from orchestrator.command import Command
from orchestrator.errors import BitgridError, ConfigError, PlanError, StoreError, StoreLockedError
from orchestrator.executors.base import Event, SlotLost
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.ledger import read_durations
from orchestrator.run import SweepRun, run_grid
from orchestrator.stage import Status
from tests.orchestrator.small_stages import gptq_fails, is_gptq, meddle, small_stage
from tests.orchestrator.sweeping import SMALL, bitgrid, committed, overrides, scores, sweep
from tests.orchestrator.tracked_mlflow import client_of, dump, runs_of
from workers.request import ErrorClass, Failure, StageRequest

pytestmark = pytest.mark.mlflow


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; commands in processes of their own run the real ones."""
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))


def resume(store: Path) -> tuple[int, str]:
    said = io.StringIO()
    return verbs.resume(store, None, Console(file=said, width=200)), said.getvalue()


def reconcile(store: Path, *given: str) -> tuple[int, str]:
    said = io.StringIO()
    return verbs.reconcile(store, None, given, Console(file=said, width=200)), said.getvalue()


def test_help_says_which_sweeps_a_verb_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, left_out in (("reconcile", "all sweeps"), ("resume", "the latest"), ("report", "the latest")):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"{left_out} when left out" in " ".join(capsys.readouterr().out.split())


# --- MLflow from the store ----------------------------------------------------------------------------------------------


def test_deleted_ledger_and_database_are_rebuilt_with_the_failed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    store = tmp_path / "store"
    meddle(monkeypatch, gptq_fails)
    assert sweep(store, "method=rtn,gptq", "tracking=mlflow").exit_code == 1
    before, history = dump(client_of(tmp_path)), read_durations(store / "ledger.sqlite")
    assert sorted(r["status"] for r in before.values()) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    (store / "ledger.sqlite").unlink()
    # MLflow keeps a deleted database open in this process; in another folder there is none either.
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(empty_mlflow, empty / "mlflow.db")
    monkeypatch.chdir(empty)
    for _ in range(2):
        assert reconcile(store)[0] == 0
        assert dump(client_of(empty)) == before
    assert read_durations(store / "ledger.sqlite") == history


def test_a_failed_variant_that_is_mended_becomes_finished_without_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    store, given = tmp_path / "store", ("method=rtn,gptq", "tracking=mlflow")
    with monkeypatch.context() as broken:
        meddle(broken, gptq_fails)
        assert sweep(store, *given).exit_code == 1
    assert resume(store)[0] == 0
    runs = runs_of(client_of(tmp_path))
    assert [r.info.status for r in runs] == ["FINISHED"] * 4
    assert not any("bitgrid.error_message" in r.data.tags for r in runs)


def test_a_sweep_without_tracking_is_written_to_mlflow_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    sweep(store, "method=rtn")
    code, said = reconcile(store)
    assert (code, "has tracking=none, so that MLflow is not written; give tracking=mlflow" in said) == (0, True)
    assert not (tmp_path / "mlflow.db").exists()
    assert reconcile(store, "tracking=mlflow")[0] == 0
    assert [r.info.status for r in runs_of(client_of(tmp_path))] == ["FINISHED"] * 3


def test_credentials_in_the_address_of_the_server_reach_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:hunter2@mlflow.example")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME"):
        sweep(tmp_path / "store", "method=rtn", "tracking=mlflow_server")
    assert not (tmp_path / "store").exists()


# --- stopped and resumed --------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_resume_goes_on_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "text.txt").write_text("Once upon a time there was a quantizer. " * 200)
    monkeypatch.chdir(home)
    shutil.copy(empty_mlflow, home / "mlflow.db")
    store = home / "store"

    def interrupt(stage: StageRequest) -> None:
        if stage.kind == "quantize":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as stopping:
        meddle(stopping, interrupt)  # type: ignore[arg-type]
        stopped = sweep(Path("store"), "method=gptq", "calibration.text.path=text.txt", "tracking=mlflow")
    assert stopped.exit_code == 130
    assert Status.CANCELLED in stopped.statuses.values()
    assert stopped.report.is_file()
    said = io.StringIO()
    run.show(stopped, Console(file=said, width=200))
    assert f"resume {stopped.plan.key[:8]} --store {store}`" in said.getvalue()
    assert f"ui --store {store}\n" in said.getvalue()
    before = committed(store)
    monkeypatch.chdir(away)
    assert resume(store)[0] == 0
    after = committed(store)
    assert before.items() < after.items()
    assert list(away.iterdir()) == [], "the sweep's own folder is where it goes on"
    assert {r.info.status for r in runs_of(client_of(home))} == {"FINISHED"}


def test_resume_refuses_a_grid_that_is_no_longer_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a quantizer. " * 200)
    store = tmp_path / "store"
    sweep(store, "method=gptq", f"calibration.text.path={text}")
    before = committed(store)
    text.write_text("Twice upon a time there was a quantizer. " * 200)
    with pytest.raises(PlanError, match="have changed since"):
        resume(store)
    assert committed(store) == before


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_resume_knows_the_configuration_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "scheme").mkdir(parents=True)
    (tmp_path / "mine" / "scheme" / "own.yaml").write_text(
        "weight: {bits: 5, granularity: group, group_size: 32}\nactivation: null\nkv: null\n"
    )
    given = ["method=rtn", "scheme=own", *(s for s in SMALL if not s.startswith("scheme"))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # Hydra's application reads it, so the verb sets it
    assert main(["run", "--config-dir", "mine", *given]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    code, said = resume(tmp_path / "bitgrid-store")
    assert code == 0
    assert "to run: nothing" in said


def test_a_command_survives_its_json() -> None:
    command = Command(("a=1",), True, jobs=(("a=1", "b=2"), ("a=2",)), config_dir="file:///x", config_name="other")
    assert Command.from_json(json.loads(json.dumps(command.to_json()))) == command
    assert command.with_overrides(["store=s"]).jobs == (("a=1", "b=2", "store=s"), ("a=2", "store=s"))


def test_the_sweep_started_last_is_the_latest(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = sweep(store, "method=rtn").result.key
    second = sweep(store, "method=rtn", "scheme=w8a16_channel").result.key
    assert run.Store(store).sweep_keys() == [second, first]
    sweep(store, "method=rtn")
    assert run.Store(store).sweep_keys() == [first, second]


# --- what goes wrong on the way ---------------------------------------------------------------------------------------------


def test_a_failed_baseline_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(stage: StageRequest) -> Failure | None:
        return Failure(ErrorClass.USER, "FakeError", "no") if stage.kind == "evaluate" and not stage.inputs else None

    meddle(monkeypatch, act)
    assert sweep(tmp_path / "store", "method=rtn").exit_code == 1


class VanishingExecutor(InProcessExecutor):
    """Loses its only worker once something was committed."""

    def __init__(self) -> None:
        super().__init__(runner=small_stage)
        self.requests = 0

    def submit(self, slot: int, request: Any) -> None:
        self.requests += 1
        self.last = request.id
        if self.requests < 2:
            super().submit(slot, request)

    def poll(self, timeout_s: float) -> list[Event]:
        return [SlotLost(0, "its node is gone", self.last)] if self.requests > 1 else super().poll(timeout_s)


def test_what_a_lost_cluster_finished_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    store = tmp_path / "store"
    with monkeypatch.context() as losing:
        losing.setattr(run, "open_executor", lambda settings: VanishingExecutor())
        lost = sweep(store, "method=rtn", "tracking=mlflow")
    assert lost.exit_code == 1
    assert lost.unfinished
    assert "its node is gone" in str(lost.ending.lost)
    assert lost.report.is_file()
    assert runs_of(client_of(tmp_path))
    assert resume(store)[0] == 0


def test_a_driver_whose_lease_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    store = tmp_path / "store"

    def take_over(stage: StageRequest) -> None:
        path = store / "lease.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another"}))

    meddle(monkeypatch, take_over)  # type: ignore[arg-type]
    with pytest.raises(StoreLockedError, match="taken over"):
        sweep(store, "method=rtn,gptq")
    assert json.loads((store / "lease.json").read_text())["token"] == "another"


def test_a_corrupt_evaluation_is_set_aside_and_run_again(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = sweep(store, "method=rtn")
    broken = first.result.variants[1].evaluations["self_perplexity"].payload
    assert broken is not None
    (broken / "items.parquet").write_bytes(b"nothing")
    again = sweep(store, "method=rtn")
    assert scores(again) == scores(first)
    assert [s for s in again.statuses.values() if s is Status.SUCCEEDED] == [Status.SUCCEEDED]
    assert len(list((store / "corrupt").iterdir())) == 1


# --- the report ---------------------------------------------------------------------------------------------------------------


def test_asked_for_the_report_is_always_written(tmp_path: Path) -> None:
    store = tmp_path / "store"
    page = sweep(store, "method=rtn").report
    whole = page.read_bytes()
    page.write_text("by an older bitgrid, which left the same digest")
    said = io.StringIO()
    assert verbs.report(store, None, Console(file=said, width=200)) == 0
    assert page.read_bytes() == whole
    assert str(page) in said.getvalue()


def test_a_report_that_cannot_be_written_is_told_below_the_table(tmp_path: Path) -> None:
    store = tmp_path / "store"
    page = sweep(store, "method=rtn").report
    # As on a store that is read-only: nothing can be written where the table goes.
    (page.parent / "table.csv").unlink()
    (page.parent / "table.csv").mkdir()
    said = io.StringIO()
    with pytest.raises(StoreError, match=r"the report cannot be written: .*table\.csv"):
        verbs.report(store, None, Console(file=said, width=200))
    assert "rtn · w4a16_g64" in said.getvalue()


def test_a_report_that_cannot_be_written_holds_up_neither_sweep_nor_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    page = sweep(tmp_path / "store", "method=rtn").report
    assert page is not None
    (page.parent / "table.csv").unlink()
    (page.parent / "table.csv").mkdir()
    command, said = Command(tuple(overrides(tmp_path / "store", "method=rtn", "tracking=mlflow")), multirun=True), io.StringIO()
    done = run_grid(command.compose(), command, Console(file=said, width=200))
    assert (done.exit_code, done.report) == (0, None)
    assert "the report cannot be written" in said.getvalue()
    assert [r.info.status for r in runs_of(client_of(tmp_path))] == ["FINISHED"] * 3


def test_a_path_with_brackets_is_told_whole(tmp_path: Path) -> None:
    sweep(tmp_path / "store", "method=rtn")
    store, said = (tmp_path / "store").rename(tmp_path / "runs[old]"), io.StringIO()
    assert verbs.report(store, None, Console(file=said, width=200)) == 0
    assert f"report: {store}/sweeps/" in said.getvalue()


# --- export ---------------------------------------------------------------------------------------------------------------------


def test_export_finds_the_model_of_a_second_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    result = sweep(store, "method=rtn", "model.dtype=float32,float16").result
    labels = [v.label for v in result.variants if v.quantize]
    assert len(labels) == 2
    started: list[list[str]] = []

    def exported(command: list[str], folder: Path) -> int:
        started.append(command)
        return 0

    monkeypatch.setattr(verbs, "run_child", exported)
    for label in labels:
        assert verbs.export(store, result.key, label, "dense", tmp_path / "out", Console(file=io.StringIO())) == 0
    models, artifacts = ([c[c.index(flag) + 1] for c in started] for flag in ("--model", "--artifact"))
    assert models[0] == models[1]
    assert (Path(models[0]) / "config.json").is_file()
    assert [Path(a).name for a in artifacts] == [v.quantize.key for v in result.variants if v.quantize]


def test_export_says_what_of_the_variant_the_checkpoint_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    result = sweep(store, "method=rtn", "scheme=w4a16_g64,w4a8_g64,w4a16kv4_g64").result
    monkeypatch.setattr(verbs, "run_child", lambda command, folder: 0)

    def said(scheme: str) -> str:
        console = Console(file=io.StringIO(), width=200)
        assert verbs.export(store, result.key, f"rtn {scheme}", "dense", tmp_path / "out", console) == 0
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "note" not in said("w4a16_g64")
    assert "quantized activations too; the checkpoint quantizes weights only" in said("w4a8_g64")
    assert "quantized keys and values too" in said("w4a16kv4_g64")
    monkeypatch.setattr(verbs, "run_child", lambda command, folder: -signal.SIGKILL)
    with pytest.raises(BitgridError, match=r"rtn · w4a16_g64' was ended by SIGKILL; where memory ran out"):
        said("w4a16_g64")


# --- beside a driver at work ------------------------------------------------------------------------------------------------


def test_verbs_that_look_need_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    sweep(store, "method=rtn")
    seen: list[str] = []

    def look(stage: StageRequest) -> None:
        if is_gptq(stage):
            for arguments in (["status"], ["report"], ["plan", "-m", *overrides(store, "method=rtn,gptq")]):
                where = [] if arguments[0] == "plan" else ["--store", str(store)]
                shown = bitgrid(tmp_path, *arguments, *where)
                seen.append(shown.stdout if shown.returncode == 0 else shown.stderr)

    meddle(monkeypatch, look)  # type: ignore[arg-type]
    assert sweep(store, "method=rtn,gptq").exit_code == 0
    status, report, plan = seen
    assert "driver: bitgrid run" in status
    assert "RUNNING" in status
    assert "PENDING" in status
    assert "report:" in report
    assert "quantize" in plan


def quiet(command: Command) -> SweepRun:
    return run_grid(command.compose(), command, Console(file=io.StringIO()))


def test_jobs_of_another_sweeper_are_resumed_as_they_were(tmp_path: Path) -> None:
    settings = tuple(overrides(tmp_path / "store"))
    command = Command((), True, jobs=((*settings, "method=rtn"), (*settings, "method=rtn", "scheme=w8a16_channel")))
    key = quiet(command).result.key
    code, said = resume(tmp_path / "store")
    assert code == 0
    assert key[:8] in said
    assert "to run: nothing" in said
