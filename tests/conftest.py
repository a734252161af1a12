"""Settings of the whole suite: telemetry off, no model hub, reproducible hypothesis runs, Ray tests in one process."""

from __future__ import annotations

import os
from functools import cache

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


NEEDS = ("nothing", "nvcc", "triton", "stages")
"""What `@pytest.mark.gpu(needs)` says, the cheapest first: nothing compiled; a library that is kept; Triton's programs, each form of which
takes seconds; all that whole stages run."""


def need_of(mark: pytest.Mark) -> str:
    need: str = mark.args[0] if mark.args else NEEDS[0]
    if need not in NEEDS:
        raise pytest.UsageError(f"gpu({need!r}): choose one of {', '.join(NEEDS)}")
    return need


@cache
def lacks(need: str) -> str | None:
    """None, or why tests on a GPU that need this do not run here."""
    import torch

    from quant.kernels import on_cuda, on_triton

    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if need == "nvcc" and on_cuda.compiler() is None:
        return "there is a CUDA device, but no nvcc"
    if need == "triton":
        if on_triton.interpreted():
            return "TRITON_INTERPRET is not 0: Triton's kernels do not run on the CUDA device"
        return on_triton.unavailable(torch.device("cuda", torch.cuda.current_device()))
    return None


def mark_gpu_tests(items: list[pytest.Item], first: bool) -> None:
    """Skips those that cannot run. first: they are sorted, the cheapest first."""
    ranks = {}
    for item in items:
        mark = item.get_closest_marker("gpu")
        need = NEEDS[0] if mark is None else need_of(mark)
        ranks[item] = NEEDS.index(need)
        reason = None if mark is None else lacks(need)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    if first:
        items.sort(key=ranks.__getitem__)


# First: pytest-xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_gpu_tests(items, first=config.option.markexpr == "gpu")
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        groups = [mark for mark in TOGETHER if item.get_closest_marker(mark)] or [f for f in FILES if item.path.stem == f]
        for group in groups[:1]:
            item.add_marker(pytest.mark.xdist_group(group))
