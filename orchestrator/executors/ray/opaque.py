"""Jobs of task functions that are not bitgrid's: one Ray call each, in a process of its own.

No more than Hydra's contract for launchers needs: no store, no retries, no progress.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from orchestrator.errors import ClusterError
from orchestrator.executors.ray.start import Session, open_session
from orchestrator.executors.settings import ClusterSettings

_sessions: list[Session] = []
"""The cluster of this process, kept for the next launch: a search sweeper launches many times."""


@dataclass(frozen=True)
class _Shared:
    """What all jobs of a launch have in common."""

    context: HydraContext
    task_function: TaskFunction
    singletons: Any
    folder: str
    """Of the driver: relative paths of jobs start there, where it exists."""


def run_jobs(
    context: HydraContext,
    task_function: TaskFunction,
    configs: Sequence[DictConfig],
    cluster: ClusterSettings,
    *,
    cores: int | None,
    per_job: Mapping[str, float],
) -> list[JobReturn | Exception]:
    """What each job returned, in order; the exception where its process died or its result could not be brought back.

    Raises ClusterError when there is no cluster, or none of the jobs could ever run on it.
    """
    session = _session(cluster, cores)
    ray: Any = importlib.import_module("ray")
    total = ray.cluster_resources()
    for name, key in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        if per_job[name] > total.get(key, 0):
            raise ClusterError(f"a job asks for {per_job[name]:g} {key}, the cluster has {total.get(key, 0):g}; lower hydra.launcher")
    # max_calls: a process per job, so that nothing of one job is left for the next.
    remote = ray.remote(max_calls=1, max_retries=0, runtime_env={"env_vars": dict(session.env)} if session.env else None, **per_job)(_run)
    shared = ray.put(_Shared(context, task_function, Singleton.get_state(), os.getcwd()))
    calls = [remote.options(name=f"job {config.hydra.job.num}").remote(shared, config) for config in configs]
    return [_fetch(call) for call in calls]


def _fetch(call: Any) -> JobReturn | Exception:
    import ray

    try:
        returned: JobReturn = ray.get(call)
    except Exception as error:
        return error
    return returned


def _run(shared: _Shared, config: DictConfig) -> JobReturn:
    """On the worker: Hydra's own way to run a job."""
    if Path(shared.folder).is_dir():
        os.chdir(shared.folder)
    Singleton.set_state(shared.singletons)
    setup_globals()
    return run_job(
        hydra_context=shared.context,
        task_function=shared.task_function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _session(cluster: ClusterSettings, cores: int | None) -> Session:
    import ray

    if _sessions and ray.is_initialized():
        return _sessions[0]
    _sessions.clear()
    session = open_session(cluster, cores or os.cpu_count() or 1)
    _sessions.append(session)
    atexit.register(close)
    return session


def close() -> None:
    """End the cluster if it was started here; leave it if it was joined. Safe to call twice."""
    while _sessions:
        _sessions.pop().close()
