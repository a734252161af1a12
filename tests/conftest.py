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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Two Ray clusters at once starve each other on a small machine, and every process that opens MLflow pays for its import and a
    # new database: under pytest-xdist each of the two has one process to itself.
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            for group in ("ray", "mlflow"):
                if item.get_closest_marker(group):
                    item.add_marker(pytest.mark.xdist_group(group))
