"""A sweep from end to end in one process: shared, resumed, repeated, broken and mended."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from orchestrator import verbs
from orchestrator.cli import main
from orchestrator.stage import Status
from orchestrator.store import Store
from orchestrator.sweeps import find_sweep
from tests.orchestrator.sweeping import ROOT, bitgrid, command, committed, overrides, scores, sweep
from workers.artifact import RECORD
from workers.export.__main__ import main as export
from workers.residency import process_residency


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with rtn and gptq on two tasks; tests that change it take a copy."""
    store = tmp_path_factory.mktemp("finished") / "store"
    run = sweep(store, "method=rtn,gptq", "task=self_perplexity,self_divergence")
    assert run.exit_code == 0
    return store


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


BOTH = ("method=rtn,gptq", "task=self_perplexity,self_divergence")


def test_scores_mean_something(finished: Path) -> None:
    found = scores(sweep(finished, *BOTH))
    baseline = found["wikitext_llama · unquantized", "self_perplexity", "ppl"]
    assert 1 < baseline < found["wikitext_llama · rtn · w4a16_g64", "self_perplexity", "ppl"] * 1.05
    assert found["wikitext_llama · unquantized", "self_divergence", "kl"] == 0
    assert 0 < found["wikitext_llama · gptq · w4a16_g64", "self_divergence", "kl"] < 1


def test_second_run_computes_nothing_and_tells_the_same_table(store: Path) -> None:
    before = committed(store)
    first = scores(sweep(store, *BOTH))
    again = sweep(store, *BOTH)
    assert committed(store) == before
    assert set(again.statuses.values()) == {Status.CACHED}
    assert scores(again) == first


def test_adding_a_method_reruns_no_old_stage(store: Path) -> None:
    before = committed(store)
    run = sweep(store, "method=rtn,gptq,awq", "task=self_perplexity,self_divergence")
    after = committed(store)
    assert {k: after[k] for k in before} == before
    ran = {run.result.stages[k].kind for k, s in run.statuses.items() if s is Status.SUCCEEDED}
    assert ran == {"calibrate", "quantize", "evaluate"}
    # absmean and samples, one quantization, two evaluations
    assert sum(s is Status.SUCCEEDED for s in run.statuses.values()) == 5


def test_failed_stage_fails_alone_and_its_dependants_are_named(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    run = sweep(tmp_path / "store", "method=rtn,gptq", f"calibration.text.path={short}")
    by_label = {run.result.stages[k].label: s for k, s in run.statuses.items()}
    assert run.exit_code == 1
    assert by_label["evaluate wikitext_llama rtn w4a16_g64 self_perplexity"] is Status.SUCCEEDED
    assert sorted(s.value for s in by_label.values() if s is not Status.SUCCEEDED) == ["DEP_FAILED", "DEP_FAILED", "FAILED"]
    failed = next(s for s in run.result.stages.values() if s.status is Status.FAILED)
    assert failed.failure is not None
    assert "tokens" in failed.failure["message"]
    shown = bitgrid(tmp_path, "status", "--store", str(tmp_path / "store"))
    assert failed.failure["message"][:40] in shown.stdout


def test_corrupt_artifact_is_set_aside_and_recomputed_with_the_same_result(store: Path) -> None:
    wanted = scores(sweep(store, *BOTH))
    quantize = next((store / "objects" / "quantize").glob("*/*"))
    tensors = next((quantize / "payload").glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    for folder in (store / "objects" / "evaluate").glob("*/*"):
        record = json.loads((folder / RECORD).read_text())
        if record["inputs"].get("quantize") == quantize.name:
            shutil.rmtree(folder)
    process_residency().clear()  # as in another process: nothing that was loaded while it was whole
    run = sweep(store, *BOTH)
    assert run.exit_code == 0
    assert scores(run) == pytest.approx(wanted, rel=1e-6)
    assert [p.name.split("-")[1] for p in (store / "corrupt").iterdir()] == [quantize.name]


TRACKED = """
import sys
from orchestrator import projection
from orchestrator.cli import main

projection.INTERVAL_S = 0.1  # runs are there early
sys.exit(main(sys.argv[1:]))
"""


def runs_in(database: Path) -> list[tuple[str, str]]:
    """Names and states of the MLflow runs, without MLflow."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return sorted(connection.execute("select name, status from runs").fetchall())


@pytest.mark.timeout(280)
def test_driver_killed_at_a_random_moment_is_resumed_to_the_same_table_and_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    store, database = tmp_path / "store", Path(shutil.copy(empty_mlflow, tmp_path / "mlflow.db"))
    grid = ("method=gptq", "task=self_perplexity,self_divergence", "tracking=mlflow")
    process = command(store, *grid, program=TRACKED)
    # Somewhere in the work, not in the imports before it: once something is committed and MLflow has a run, at a random moment.
    while process.poll() is None and not (committed(store) and runs_in(database)):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    seen = committed(store)
    assert process.returncode in (0, -signal.SIGKILL), said
    assert seen
    assert runs_in(database)
    monkeypatch.chdir(tmp_path)
    run = sweep(store, *grid)
    final = committed(store)
    assert {k: final[k] for k in seen} == seen
    wanted, found = scores(sweep(finished, *BOTH)), scores(run)
    assert found == pytest.approx({k: wanted[k] for k in found}, rel=1e-6)
    assert list((store / "staging").iterdir()) == []
    runs = runs_in(database)
    assert len({name for name, _ in runs}) == len(runs) == 1 + len(run.result.variants)
    assert {status for _, status in runs} == {"FINISHED"}


def test_a_finished_variant_is_exported(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(arguments: list[str], folder: Path) -> int:
        assert arguments[:3] == [sys.executable, "-m", "workers.export"]
        return export(arguments[3:])

    monkeypatch.setattr(verbs, "run_child", in_this_process)
    key, out = find_sweep(Store(finished), None), tmp_path / "out"
    assert main(["export", key[:8], "gptq w4a16_g64", "--store", str(finished), "--format", "gguf", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "unknown export format 'gguf'; allowed: auto_gptq, dense\n"
    assert main(["export", key[:8], "gptq w4a16_g64", "--store", str(finished), "--format", "dense", "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[0].self_attn.q_proj.weight
    groups = weight.detach().float().view(len(weight), -1, 64)
    assert max(len(g.unique()) for g in groups.flatten(0, 1)) <= 16


def test_explain_names_the_field_that_made_a_stage_miss(store: Path) -> None:
    shown = bitgrid(store.parent, "explain", *overrides(store, "method=gptq", "method.rounding.params.damp=0.05"))
    assert "damp: stored 0.01, wanted 0.05" in shown.stdout, shown.stdout + shown.stderr


def test_plan_runs_nothing_and_never_imports_torch(tmp_path: Path) -> None:
    probe = (
        "import sys; from orchestrator.cli import main; code = main(sys.argv[1:]);"
        "print('heavy:', sorted({'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules))); sys.exit(code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", probe, "plan", "-m", "sweep=demo"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "140"},
        capture_output=True,
        text=True,
    )
    assert "heavy: []" in done.stdout, done.stdout + done.stderr
    assert "evaluate" in done.stdout
    assert re.search(r"in all [\d.]+ \w+.* to .*work", done.stdout), "ranges, until something has run"
    assert not (tmp_path / "bitgrid-store" / "objects").exists()
