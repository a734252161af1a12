"""Hydra's own suites pass with the launcher; bitgrid's jobs become one grid; jobs that die are FAILED, alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, LauncherTestSuite
from omegaconf import DictConfig

CORES = "hydra.launcher.num_cpus=2"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for the module, started by the first launch."""
    yield
    from orchestrator.executors.ray.opaque import close

    close()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("bitgrid", [CORES])])
class TestLauncher(LauncherTestSuite):
    """Hydra's contract for launchers."""


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("bitgrid", [CORES, "hydra/sweeper=bitgrid", "hydra.sweeper.max_batch_size=2"])])
class TestBatchedSweeper(BatchedSweeperTestSuite):
    """Hydra's contract for sweepers that launch in batches."""


def test_hydra_finds_launcher_and_sweeper() -> None:
    names = {f"{c.__module__}.{c.__name__}" for kind in (Launcher, Sweeper) for c in Plugins.instance().discover(kind)}
    assert {"hydra_plugins.bitgrid.launcher.BitgridLauncher", "hydra_plugins.bitgrid.sweeper.BitgridSweeper"} <= names


def dies_in_the_second_job(config: DictConfig) -> int:
    if config.a == 1:
        os.kill(os.getpid(), 9)
    if config.a == 2:
        raise RuntimeError("two")
    return os.getpid()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster", "hydra_restore_singletons")
def test_a_job_that_dies_is_failed_and_the_others_return_from_processes_of_their_own(hydra_sweep_runner: Any, tmp_path: Path) -> None:
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
        overrides=["hydra/launcher=bitgrid", CORES, "+a=0,1,2,3"],
        temp_dir=tmp_path,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch_opaque", keep)
        with pytest.raises(Exception, match="died"), sweep:
            pass
    assert [r.status for r in seen] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert [r.overrides for r in seen] == [["+a=0"], ["+a=1"], ["+a=2"], ["+a=3"]]
    assert seen[1].cfg.a == 1
    assert seen[1].hydra_cfg.hydra.job.num == 1
    with pytest.raises(RuntimeError, match="two"):
        _ = seen[2].return_value
    assert len({os.getpid(), seen[0].return_value, seen[3].return_value}) == 3
