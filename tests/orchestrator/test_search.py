"""Sweepers that choose cells by the scores of earlier ones: launch by launch, as Optuna's does, each launch a sweep of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from orchestrator import run
from orchestrator.cli import main
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.store import Store
from orchestrator.sweeps import load_sweep
from tests.orchestrator.small_stages import gptq_fails, meddle, small_stage
from tests.orchestrator.sweeping import overrides
from workers.request import Failure, StageRequest

DAMP = "method.rounding.params.damp"


class Searching(Sweeper):
    """One job per launch: the end of an interval first, then values that follow from the score before. Failures do not end it."""

    seen: ClassVar[list[tuple[float, float]]] = []
    """(value, score) of each trial."""

    def __init__(self, trials: int, params: dict[str, str] | None = None) -> None:
        self.trials, self.params = trials, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        lines = [*(f"{k}={v}" for k, v in self.params.items()), *arguments]
        parsed = OverridesParser.create().parse_overrides(lines)
        searched = next(o for o in parsed if o.is_interval_sweep())
        fixed = [str(o.input_line) for o in parsed if o is not searched]
        interval: Any = searched.value()
        assert self.launcher is not None
        value = interval.end
        for number in range(self.trials):
            (job,) = self.launcher.launch([[f"{searched.get_key_element()}={value}", *fixed]], initial_job_idx=number)
            Searching.seen.append((value, float(job.return_value)))
            value = interval.start + (interval.end - interval.start) * (job.return_value % 1)
        (self.folder / "found.yaml").write_text("best: 1\n")


class Batch(Sweeper):
    """Given jobs in one launch; as Optuna's with a failure rate of 1, it goes on with what has a score and wants one at least."""

    returned: ClassVar[list[JobReturn]] = []

    def __init__(self, jobs: list[list[str]]) -> None:
        self.jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        assert self.launcher is not None
        Batch.returned = list(self.launcher.launch([[*job, *arguments] for job in self.jobs], initial_job_idx=0))
        if all(r.status is JobStatus.FAILED for r in Batch.returned):
            raise ValueError("No trials are completed yet.")


Searching.__module__ = Batch.__module__ = "hydra_plugins.searching"  # Hydra takes plugins of this package alone


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hydra_restore_singletons: Any) -> list[str]:
    """Arguments of a search by that sweeper."""
    Searching.seen = []
    monkeypatch.setitem(sys.modules, Searching.__module__, sys.modules[__name__])
    monkeypatch.setattr("hydra_plugins.searching", sys.modules[__name__], raising=False)
    Plugins.instance().register(Searching)
    Plugins.instance().register(Batch)
    node = {"_target_": "hydra_plugins.searching.Searching", "trials": 3, "params": None}
    ConfigStore.instance().store(group="hydra/sweeper", name="searching", node=node)
    ConfigStore.instance().store(group="hydra/sweeper", name="batch", node={"_target_": "hydra_plugins.searching.Batch", "jobs": []})
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    return ["-m", "hydra/sweeper=searching", *overrides(tmp_path / "store", "method=gptq")]


def found(store: Store) -> list[tuple[str, float]]:
    """(label, score) of the quantized variants of all sweeps, the oldest sweep first."""
    results = [load_sweep(store, key) for key in reversed(store.sweep_keys())]
    variants = [v for r in results for v in r.variants if not v.is_baseline]
    return [(v.label, v.evaluations["self_perplexity"].summary["scores"]["ppl"]) for v in variants]


@pytest.mark.parametrize("in_yaml", [False, True])
def test_a_search_gets_scores_and_names_what_it_searches(
    search: list[str], in_yaml: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interval = "interval(0.01,0.2)"
    asked = f"hydra.sweeper.params={{{DAMP}:'{interval}'}}" if in_yaml else f"{DAMP}={interval}"
    assert main(["run", *search, asked]) == 0
    assert len({value for value, _ in Searching.seen}) == 3
    labels = [f"wikitext_llama · gptq[rounding.params.damp={value}] · w4a16_g64" for value, _ in Searching.seen]
    assert found(Store(tmp_path / "store")) == list(zip(labels, (score for _, score in Searching.seen), strict=True))
    assert "the sweeper's own files: multirun" in capsys.readouterr().out


def test_a_search_has_no_plan_and_wrong_settings_are_told_before_it(search: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = f"{DAMP}=interval(0.01,0.2)"
    assert main(["plan", *search, asked]) == 2
    assert "hydra/sweeper=searching chooses cells while it runs" in capsys.readouterr().err
    assert main(["run", *search, asked, "hints.thread=1"]) == 2
    assert "unknown key" in capsys.readouterr().err
    assert Searching.seen == []


@pytest.mark.parametrize("kind", ["sweeper", "launcher"])
def test_a_plugin_that_is_not_installed_is_told_with_its_package(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("plan", "run"):
        assert main([verb, "-m", f"hydra/{kind}=absent"]) == 2
        told = capsys.readouterr().err
        assert f"unknown hydra/{kind} 'absent'; allowed: basic, bitgrid" in told
        assert f"packages of their own, often named hydra-NAME-{kind}" in told


def test_a_sweeper_may_be_chosen_in_the_yaml_of_a_named_sweep(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    (tmp_path / "own" / "sweep" / "damping.yaml").write_text(
        "# @package _global_\n"
        "defaults: [none, override /hydra/sweeper: searching, _self_]\n"
        "sweep: {name: damping}\n"
        f"hydra: {{sweeper: {{trials: 2, params: {{{DAMP}: 'interval(0.01,0.2)'}}}}}}\n"
    )
    named = ["-m", f"--config-dir={tmp_path / 'own'}", "sweep=damping", *search[2:]]
    assert main(["run", *named]) == 0
    assert len(Searching.seen) == 2
    assert len(found(Store(tmp_path / "store"))) == 2
    capsys.readouterr()
    assert main(["plan", *named]) == 2
    assert "hydra/sweeper=searching chooses cells while it runs" in capsys.readouterr().err
    assert main(["plan", *named, "hydra/sweeper=bitgrid"]) == 2  # the command line wins
    assert "'trials' not in 'BitgridSweeperConf'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sqlalchemy", "storage", "refused"),
    [("2.0.1", "sqlite:///a.db", True), ("1.4.54", "sqlite:///a.db", False), ("2.0.1", "redis://host", False), ("2.0.1", "null", False)],
)
def test_a_database_that_optuna_cannot_use_is_refused(
    sqlalchemy: str, storage: str, refused: bool, search: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.grid.metadata.version", {"optuna": "2.10.1", "sqlalchemy": sqlalchemy}.__getitem__)
    node = {"_target_": "hydra_plugins.searching.OptunaSweeper", "params": None, "storage": None}
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=node)
    asked = ["-m", "hydra/sweeper=optuna", *search[2:], f"{DAMP}=interval(0.01,0.2)", f"hydra.sweeper.storage='{storage}'"]
    assert main(["plan", *asked] if storage != "null" else ["plan", *asked[:-1]]) == 2
    said = capsys.readouterr().err
    assert ("Optuna 2.10.1 cannot use a database through SQLAlchemy 2.0.1" in said) is refused
    assert ("chooses cells while it runs" in said) is not refused


def test_a_store_that_cannot_be_made_ends_a_search_with_a_message(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as end:
        main(["run", *search, f"{DAMP}=interval(0.01,0.2)", f"store={tmp_path / 'file' / 'store'}"])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("bitgrid: the store "), "Traceback" in said) == (2, 1, False)


@pytest.mark.parametrize("launcher", ["bitgrid", "basic"])
def test_a_search_that_is_stopped_starts_no_further_launch(
    launcher: str, search: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(stage: StageRequest) -> Failure | None:
        if stage.kind == "evaluate" and "quantize" in stage.inputs:
            os.kill(os.getpid(), signal.SIGINT)
        return None

    meddle(monkeypatch, stop)
    assert main(["run", *search, f"{DAMP}=interval(0.01,0.2)", f"hydra/launcher={launcher}"]) == 130
    assert len(Store(tmp_path / "store").sweep_keys()) == 1
    assert "the same command goes on with the search" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("method.rounding.params.dmp=interval(0.01,0.2)", "unknown key of method.rounding.params in method gptq 'dmp'; nearest: damp"),
        ("hydra.sweeper.params={method.rounding.params.dmp:'interval(0.01,0.2)'}", "'dmp'; nearest: damp"),
        (f"{DAMP}=interval(-0.2,-0.1)", "is not a value for gptq"),
        ("calibration.samples=interval(2,4)", "expected a whole number like 64; of intervals the middle was tried, int(interval(2,8))"),
        ("task=self_perplexity,self_divergence", "those of different tasks do not compare"),
        ("task.params.limit=1,2", "those of different tasks do not compare"),
        ("+hydra.sweeper.direction=[minimize,minimize]", "a trial has one score, ppl of self_perplexity"),
        ("+hydra.sweeper.direction=maximize", "would look for the worst cell: lower ppl of self_perplexity is better; give minimize"),
        ("+hydra.sweeper.direction=maximise", "unknown hydra.sweeper.direction 'maximise'; nearest: maximize"),
    ],
)
def test_what_is_wrong_in_every_trial_is_told_before_the_first(
    asked: str, told: str, search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("plan", "run"):
        assert main([verb, *(s for s in search if s.partition("=")[0] != asked.partition("=")[0]), asked]) == 2
        assert told in capsys.readouterr().err
    assert (Searching.seen, (tmp_path / "store").exists()) == ([], False)


def test_a_parameter_of_some_options_alone_may_be_searched(search: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *search[:-1], "method=rtn,gptq", f"{DAMP}=interval(0.01,0.2)", "+hydra.sweeper.direction=minimize"]) == 2
    assert "chooses cells while it runs" in capsys.readouterr().err


def test_jobs_beside_one_that_cannot_be_composed_run(search: list[str], tmp_path: Path) -> None:
    jobs = f"[['{DAMP}=-1'],['{DAMP}=0.02'],['method.rounding.params.dmp=0.02'],['{DAMP}=0.03']]"
    assert main(["run", *search, "hydra/sweeper=batch", f"hydra.sweeper.jobs={jobs}"]) == 1
    told = [repr(r._return_value) for r in Batch.returned]
    assert "damp=-1 is not a value for gptq" in told[0]
    assert "'dmp'; nearest: damp" in told[2]
    assert [(f"wikitext_llama · gptq[rounding.params.damp={d}] · w4a16_g64", told[n]) for n, d in ((1, 0.02), (3, 0.03))] == [
        (label, repr(score)) for label, score in found(Store(tmp_path / "store"))
    ]


@pytest.mark.parametrize(
    ("jobs", "code", "told"),
    [
        (f"[['{DAMP}=-1']]", 1, "no trial of the search has a score: ValueError: No trials are completed yet."),
        ("[]", 2, "the sweeper asked for no job; give numbers from 1"),
    ],
)
def test_a_search_without_any_score_is_told(jobs: str, code: int, told: str, search: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        ended = main(["run", *search, "hydra/sweeper=batch", f"hydra.sweeper.jobs={jobs}"])
    except SystemExit as end:
        ended = int(str(end.code))
    said = capsys.readouterr().err
    assert (ended, said.count(f"bitgrid: {told}"), "Traceback" in said) == (code, 1, False)


@pytest.mark.parametrize("launcher", ["bitgrid", "basic"])
def test_a_failed_trial_that_ends_a_search_is_told_without_a_traceback(
    launcher: str, search: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meddle(monkeypatch, gptq_fails)
    assert main(["run", *search, f"{DAMP}=interval(0.01,0.2)", f"hydra/launcher={launcher}"]) == 1
    said = capsys.readouterr().err
    assert ("the Hessian is not positive definite" in said.splitlines()[-1], "Traceback" in said) == (True, False)
