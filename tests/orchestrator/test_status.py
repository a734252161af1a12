"""`bitgrid status` while a driver is at work, and when one is gone."""

from __future__ import annotations

import io
import itertools
import json
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import run, verbs
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.hooks import StoreHooks
from orchestrator.ledger import Ledger
from orchestrator.results import StageResult, VariantResult
from orchestrator.retries import Adjustment, worker_lost
from orchestrator.stage import Status
from orchestrator.store import Store
from orchestrator.sweeps import load_sweep
from tests.orchestrator.small_stages import gptq_fails, is_gptq, meddle, small_stage
from tests.orchestrator.sweeping import command, sweep
from workers.request import Hints
from workers.specs import StageKind

WAITING = """
import sys, time
from pathlib import Path
from orchestrator import run
from orchestrator.cli import main
from orchestrator.executors.in_process import InProcessExecutor

def wait(request, on_outcome, should_stop):
    (Path(request.stages[0].staging).parent.parent / "waits").touch()
    time.sleep(200)

run.open_executor = lambda settings: InProcessExecutor(runner=wait)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))


def told_by(status: str) -> set[str]:
    """What `bitgrid status` counts."""
    return {" ".join(line.split()) for line in status.splitlines() if line.split()[0] in ("calibrate", "quantize", "evaluate")}


def status_of(store: Path) -> str:
    said = io.StringIO()
    assert verbs.status(store, None, Console(file=said, width=200)) == 0
    return said.getvalue()


def test_a_stage_runs_only_as_long_as_its_driver_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    process = command(store, "method=gptq", program=WAITING)
    while process.poll() is None and not (store / "waits").exists():
        time.sleep(0.02)
    rest = {"evaluate PENDING 2", "quantize PENDING 1"}
    try:
        assert told_by(status_of(store)) == rest | {"calibrate RUNNING 1"}
    finally:
        process.kill()
        said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert list((store / "staging").iterdir())  # nobody was there to clear it
    assert told_by(status_of(store)) == rest | {"calibrate PENDING 1"}
    # Nor does the next driver run what that one had under way.
    during: list[str] = []
    monkeypatch.setattr(verbs, "try_report", lambda *_: during.append(status_of(store)))
    assert verbs.reconcile(store, None, [], Console(file=io.StringIO())) == 0
    assert "driver: bitgrid reconcile" in during[0]
    assert told_by(during[0]) == rest | {"calibrate PENDING 1"}


def test_a_variant_is_not_done_while_a_stage_of_it_runs(tmp_path: Path) -> None:
    made, store = sweep(tmp_path / "store", "method=rtn"), Store(tmp_path / "store")
    evaluate = made.result.variants[1].evaluations["self_perplexity"]
    store.set_aside(StageKind.EVALUATE, evaluate.key)
    assert load_sweep(store, made.result.key, {evaluate.key}).variants[1].status is Status.RUNNING


def test_a_failed_stage_that_is_tried_again_runs_and_blocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, during = tmp_path / "store", list[str]()
    with monkeypatch.context() as broken:
        meddle(broken, gptq_fails)
        sweep(store, "method=gptq")
    assert {"quantize FAILED 1", "evaluate DEP_FAILED 1"} <= told_by(status_of(store))
    meddle(monkeypatch, lambda stage: during.append(status_of(store)) if is_gptq(stage) else None)  # type: ignore[func-returns-value]
    assert verbs.resume(store, None, Console(file=io.StringIO())) == 0
    assert {"quantize RUNNING 1", "evaluate PENDING 1"} <= told_by(during[0])
    assert "FAILED" not in during[0]


@pytest.mark.parametrize("after", [Status.PENDING, Status.CANCELLED])
def test_a_stage_whose_worker_is_lost_runs_no_longer(after: Status, tmp_path: Path) -> None:
    """Neither while it waits for another, nor once it has failed there."""
    plan = sweep(tmp_path / "store", "method=rtn").plan
    stage, store = next(iter(plan.stages.values())), Store(tmp_path / "store")
    with Ledger(store.root / "ledger.sqlite") as ledger:
        hooks = StoreHooks(store, ledger, plan, Hints(), ())
        hooks.request("r1", [stage], {stage.key: 1}, Adjustment())
        hooks.status(stage, Status.RUNNING, None)
        assert store.staged() == {stage.key}
        hooks.status(stage, after, None)
    assert store.staged() == set()


def test_the_log_of_a_stage_whose_worker_is_lost_is_kept(tmp_path: Path) -> None:
    plan = sweep(tmp_path / "store", "method=rtn").plan
    stage, store = next(iter(plan.stages.values())), Store(tmp_path / "store")
    with Ledger(store.root / "ledger.sqlite") as ledger:
        hooks = StoreHooks(store, ledger, plan, Hints(), ())
        request = hooks.request("r1", [stage], {stage.key: 1}, Adjustment())
        # Killed in the middle of a character.
        (Path(request.stages[0].staging) / "log.txt").write_bytes("block 7 of 32 …".encode()[:-1])
        hooks.failed_attempt(stage, worker_lost("it died"), 1, False)
    told = json.loads(next((store.root / "attempts" / stage.key).iterdir()).read_text())
    assert told["log_tail"].startswith("block 7 of 32")


def test_a_variant_stands_where_the_worst_of_its_stages_does() -> None:
    worst_first = (Status.FAILED, Status.DEP_FAILED, Status.CANCELLED, Status.RUNNING, Status.PENDING, Status.SUCCEEDED)
    for worst, other in itertools.combinations_with_replacement(worst_first, 2):
        for statuses in set(itertools.permutations((worst, other, other))):
            quantize, evaluate, measure = (StageResult(s.value, "", "", s) for s in statuses)
            assert VariantResult("v", "", {}, False, "b", quantize, {"task": evaluate}, measure).status is worst


def test_a_stage_has_ended_once_it_is_committed_or_failed_for_good() -> None:
    failed = {"ended": 7.0}
    done = StageResult("k", "", "", Status.SUCCEEDED, {"started": 10.0, "ended": 12.5}, failure=failed)
    assert (done.seconds, done.ended) == (2.5, 12.5)
    for status, ended in ((Status.FAILED, 7.0), (Status.RUNNING, None), (Status.PENDING, None)):
        tried = StageResult("k", "", "", status, failure=failed)
        assert (tried.seconds, tried.ended) == (None, ended)
