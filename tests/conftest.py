"""Settings of the whole suite: telemetry off, no model hub, reproducible hypothesis runs, Ray tests in one process."""

from __future__ import annotations

import os

import pytest
from hypothesis import Phase, settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when Triton is imported: its kernels run on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Not `explain`: before Python 3.12 it traces every line, which makes a library's first import in such a test take a minute.
settings.register_profile("suite", deadline=None, derandomize=True, phases=set(Phase) - {Phase.explain})
settings.load_profile("suite")


TOGETHER = ("ray", "mlflow")
"""Marks whose tests share a process: two Ray clusters at once starve each other on a small machine, and every process that opens MLflow
pays for its import and a new database."""
FILES = ("test_planted", "test_sweep")
"""Files whose tests do: each process would make their fixtures, seconds of work, anew."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    # One more than cores: tests wait for servers and clusters.
    given = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    return int(given) if given else (os.cpu_count() or 1) + 1


# First: pytest-xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        groups = [mark for mark in TOGETHER if item.get_closest_marker(mark)] or [f for f in FILES if item.path.stem == f]
        for group in groups[:1]:
            item.add_marker(pytest.mark.xdist_group(group))
