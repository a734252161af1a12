"""Cells under Hydra's own sweeper and launcher: one after the other, each a sweep of one cell, all in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orchestrator import run
from orchestrator.cli import main
from orchestrator.command import Command
from orchestrator.errors import ConfigError
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.store import Store
from tests.orchestrator.small_stages import small_stage
from tests.orchestrator.sweeping import committed, overrides

BASIC = ("hydra/sweeper=basic", "hydra/launcher=basic")


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_cells_run_under_the_basic_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))
    monkeypatch.setattr(sys, "argv", sys.argv)  # Hydra's application reads it, so the verb sets it
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    assert main(["run", "-m", *BASIC, *overrides(store, "method=rtn,gptq")]) == 0
    assert len(Store(store).sweep_keys()) == 2
    # The baseline is of both cells: one Hessian, two quantizations, three evaluations.
    assert len(committed(store)) == 6


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["hydra.launcher.num_cpus=2"], "hydra.launcher.num_cpus=2 would have no effect: .* cluster.slots"),
        (["hydra.launcher.num_cpus=2", "hydra/sweeper=basic"], "hydra.launcher.num_cpus=2 would have no effect"),
        (["hydra/launcher=basic"], "hydra/launcher=basic would have no effect: .*give hydra/sweeper=basic too"),
        (["hydra.sweeper.max_batch_size=1"], "max_batch_size=1 would have no effect"),
        (["hydra.sweeper.params={method:'rtn,gptq'}"], "method:'rtn,gptq'}: a mapping cannot be given here at once; give its keys as"),
        (["hydra.searchpath=[file://nowhere]"], "hydra.searchpath: .*nowhere is not there"),
        (
            ["hydra/sweeper=basic", "sweep=examples"],
            "sweep.exclude, .*sweep.extra of sweep=examples would have no effect: hydra/sweeper=basic",
        ),
        (["hydra/sweeper=basic", "sweep.exclude=[{method:gptq}]"], "^sweep.exclude would have no effect: "),
        ([*BASIC, "hydra.sweeper.max_batch_size=1"], None),
    ],
)
def test_settings_of_hydra_without_effect_are_refused(given: list[str], told: str | None) -> None:
    command = Command(("method=rtn", *given), multirun=True)
    if told is None:
        assert command.compose().cells
        return
    with pytest.raises(ConfigError, match=told):
        command.compose()
