"""Fixtures of the orchestrator's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.planned import Plan

PlanOf = Callable[..., Plan]


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new, migrated MLflow database: making one takes seconds, so tests copy it."""
    from orchestrator.track import open_tracker

    folder = tmp_path_factory.mktemp("mlflow")
    tracker = open_tracker({"kind": "mlflow"}, folder)
    assert tracker.prepare() is None
    tracker.close()
    return folder / "mlflow.db"


@pytest.fixture
def mlflow_project(tmp_path: Path, empty_mlflow: Path) -> Path:
    """A project folder with an empty MLflow database."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    return folder


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    """Plan of a grid, by its overrides."""
    from orchestrator.grid import compose_grid
    from orchestrator.plan import build_plan
    from orchestrator.sources import Sources

    def make(*overrides: str) -> Plan:
        grid = compose_grid(["task=self_perplexity", *overrides], multirun=True)
        return build_plan(grid, Sources(None, None, tmp_path / "digests.json"))

    return make
