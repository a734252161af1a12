"""Where requests run: in this process, or on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.executors.base import Executor
from orchestrator.executors.settings import ClusterSettings


def open_executor(settings: Mapping[str, Any]) -> Executor:
    """The executor of a sweep's settings (`settings["cluster"]`), not started. Raises ConfigError."""
    cluster = ClusterSettings.from_config(settings["cluster"])
    if cluster.kind == "in_process":
        from orchestrator.executors.in_process import InProcessExecutor

        return InProcessExecutor(cluster.threads)
    from orchestrator.executors.ray.executor import RayExecutor

    return RayExecutor(cluster)
