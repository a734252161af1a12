"""Hydra's own suites pass with the launcher; bitgrid's jobs become one grid; jobs that die are FAILED, alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, LauncherTestSuite
from omegaconf import DictConfig

from orchestrator import app
from orchestrator.cell import Cell, Grid
from orchestrator.command import Command
from orchestrator.errors import BitgridError
from orchestrator.launch import bitgrid_task, is_bitgrid_task
from orchestrator.planned import PlannedCell, Skip
from orchestrator.run import Ending

CORES = "hydra.launcher.num_cpus=2"
CHDIR = "hydra.job.chdir=true"
"""Hydra's suites look for a job's files in its working folder, which was the default before version_base 1.2."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for the module, started by the first launch."""
    yield
    from orchestrator.executors.ray.opaque import close

    close()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("bitgrid", [CORES, CHDIR])])
class TestLauncher(LauncherTestSuite):
    """Hydra's contract for launchers."""


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("bitgrid", [CORES, CHDIR, "hydra/sweeper=bitgrid", "hydra.sweeper.max_batch_size=2"])]
)
class TestBatchedSweeper(BatchedSweeperTestSuite):
    """Hydra's contract for sweepers that launch in batches."""


ROOT = Path(__file__).resolve().parents[2]
OTHER_APP = """
import hydra, sys
@hydra.main(version_base="1.3", config_path=None)
def app(config): ...
app()
heavy = [m for m in ("ray", "torch", "mlflow", "orchestrator") if m in sys.modules]
assert not heavy, heavy
"""


def test_other_hydra_programs_find_the_plugins_and_pay_nothing_for_them(tmp_path: Path) -> None:
    """From outside the checkout, which an editable install puts on the path."""
    (tmp_path / "app.py").write_text(OTHER_APP)
    run = [sys.executable, "app.py", "--info", "plugins"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert "BitgridLauncher" in shown
    assert "BitgridSweeper" in shown


def dies_in_the_second_job(config: DictConfig) -> int:
    if config.a == 1:
        os.kill(os.getpid(), 9)
    if config.a == 2:
        raise RuntimeError("two")
    return os.getpid()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster", "hydra_restore_singletons")
def test_a_job_that_dies_is_failed_and_the_others_return(hydra_sweep_runner: Any, tmp_path: Path) -> None:
    from orchestrator import launch

    seen: list[Any] = []
    original = launch.launch_opaque

    def keep(*args: Any) -> Any:
        seen.extend(original(*args))
        return seen

    sweep = hydra_sweep_runner(
        calling_file=None,
        calling_module="hydra.test_utils.a_module",
        task_function=dies_in_the_second_job,
        config_path="configs",
        config_name="compose.yaml",
        overrides=["hydra/launcher=bitgrid", CORES, "+a=0,1,2"],
        temp_dir=tmp_path,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch_opaque", keep)
        with pytest.raises(Exception, match="died"), sweep:
            pass
    assert [r.status for r in seen] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.FAILED]
    assert [r.overrides for r in seen] == [["+a=0"], ["+a=1"], ["+a=2"]]
    assert seen[1].cfg.a == 1
    assert seen[1].hydra_cfg.hydra.job.num == 1
    with pytest.raises(RuntimeError, match="two"):
        _ = seen[2].return_value
    assert seen[0].return_value != os.getpid()


@dataclass
class FakePlan:
    cells: list[PlannedCell]
    skipped: list[Skip]


@dataclass
class FakeRun:
    """Of a sweep that ran nothing: w4a16_channel scores 4, w3a16_channel failed, w2a16_channel is impossible."""

    plan: FakePlan
    ending: Ending = field(default_factory=lambda: Ending({}))


@dataclass
class FakeApplication:
    """In place of `orchestrator.app`'s functions: keeps what it was asked for."""

    grids: list[Grid] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)

    def sweep(self, command: Command, grid: Grid | None = None) -> FakeRun:
        grid = command.compose() if grid is None else grid
        self.grids.append(grid)
        self.asked.append([o for o in command.overrides if not o.startswith("hydra")])
        possible = [c for c in grid.cells if c.scheme.name != "w2a16_channel"]
        impossible = [Skip(c, "too few bits") for c in grid.cells if c not in possible]
        return FakeRun(FakePlan([PlannedCell(c, "variant", c.scheme.name) for c in possible], impossible))

    def score(self, run: FakeRun, evaluate: str, task_name: str) -> float:
        if evaluate == "w3a16_channel":
            raise BitgridError(f"{evaluate} on {task_name} has no score: out of paper")
        return 4.0


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> FakeApplication:
    fake = FakeApplication()
    monkeypatch.setattr(app, "sweep", fake.sweep)
    monkeypatch.setattr(app, "score", fake.score)
    return fake


@bitgrid_task
def own_task(config: DictConfig) -> float:
    raise AssertionError("bitgrid's plugins run cells themselves")


def multirun(folder: Path, *overrides: str) -> Any:
    loader = create_config_search_path("pkg://conf")
    try:
        hydra = Hydra.create_main_hydra2("bitgrid", loader)
        lines = [f"hydra.sweep.dir={folder}", *overrides]
        return hydra.multirun(config_name="config", task_function=own_task, overrides=lines, with_log_configuration=False)
    finally:
        GlobalHydra().clear()


def names(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    return [(c.method.name, c.scheme.name) for c in cells]


GRID = ("method=rtn,gptq", "scheme=w4a16_channel,w3a16_channel")


def test_the_task_of_the_application_is_marked() -> None:
    assert is_bitgrid_task(app.task.__wrapped__)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_the_sweeper_hands_over_the_grid_as_a_whole_with_its_rules(application: FakeApplication, tmp_path: Path) -> None:
    multirun(tmp_path, "sweep=examples")
    assert len(application.grids) == 1
    assert len(application.grids[0].excluded) == 10
    assert application.asked == [["sweep=examples"]]


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_wrong_input_to_the_sweeper_ends_with_a_message(
    application: FakeApplication, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        multirun(tmp_path, "method=rtn,gptq", "scheme=w9,w4a16_g64")
    assert end.value.code == 2
    assert "unknown scheme 'w9'" in capsys.readouterr().err


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_jobs_of_a_foreign_sweeper_are_one_grid_with_honest_returns(
    application: FakeApplication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import launch

    returns: list[JobReturn] = []
    original = launch.launch_cells
    monkeypatch.setattr(launch, "launch_cells", lambda x: returns.extend(original(x)) or returns)
    with pytest.raises(BitgridError, match="out of paper"):
        multirun(tmp_path, *GRID[:1], "scheme=w4a16_channel,w3a16_channel,w2a16_channel", "hydra/sweeper=basic")
    assert len(application.grids) == 1
    assert len(application.grids[0].cells) == len(returns) == 6
    assert [r.status for r in returns] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.FAILED] * 2
    assert returns[0].return_value == 4.0
    with pytest.raises(BitgridError, match="the cell is impossible: too few bits"):
        _ = returns[2].return_value
    assert [list(r.overrides or []) for r in returns][3] == ["method=gptq", "scheme=w4a16_channel"]
    for number, job in enumerate(returns):
        assert job.cfg is not None
        assert job.hydra_cfg is not None
        assert "hydra" not in job.cfg
        assert job.hydra_cfg.hydra.job.num == number
        assert job.working_dir == os.getcwd()
        assert job.task_name == "bitgrid"


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_wrong_settings_fail_every_job(application: FakeApplication, tmp_path: Path) -> None:
    with pytest.raises(BitgridError, match="differ in settings"):
        multirun(tmp_path, "store=a,b", "hydra/sweeper=basic")
    assert application.grids == []
