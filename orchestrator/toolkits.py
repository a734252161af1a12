"""Environments of other toolkits on the driver: where they are, whether a plan's are there, and how one is made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.errors import ConfigError, PlanError, unknown_name
from orchestrator.lines import say
from orchestrator.places import expanded, place
from orchestrator.planned import Plan
from workers.toolkits.environments import TOOLKITS, Toolkit, installed_release, problem, python_of

FOLDER = "bitgrid-toolkits"
INSTALLED = ".installed"
"""In an environment: a copy of the lock it was made from."""
LEAST_PYTHON = (3, 11)
"""That all locks install on."""


def toolkits_dir(settings: Mapping[str, Any]) -> Path:
    return place("toolkits_dir=", str(settings.get("toolkits_dir") or FOLDER))


def folders_of(plan: Plan, stages: Collection[str]) -> dict[str, str]:
    """Toolkit ▸ folder of its environment, of those that these stages run."""
    parent = toolkits_dir(plan.grid.settings)
    return {need.toolkit: str(parent / need.toolkit) for key in stages if (need := plan.toolkits.get(key)) is not None}


def require_toolkits(plan: Plan, stages: Collection[str]) -> None:
    """Raises PlanError where a stage that is to run lacks its environment, or the release it asks for."""
    parent = toolkits_dir(plan.grid.settings)
    needs = sorted({plan.toolkits[key] for key in stages if key in plan.toolkits})
    reasons = [reason for need in needs if (reason := problem(parent / need.toolkit, need.toolkit, need.release)) is not None]
    if reasons:
        raise PlanError("\n".join(reasons))


def install(name: str, parent: Path, python: str, console: Console) -> Path:
    """Make (or bring up to its lock) the environment of a toolkit; its folder. Raises ConfigError for an unknown name, a Python that is
    too old, a folder that is something else, and where venv or pip fail."""
    toolkit = TOOLKITS.get(name)
    if toolkit is None:
        raise ConfigError(unknown_name("toolkit", name, TOOLKITS))
    folder = (place("--dir ", parent) / name).resolve()
    lock = toolkit.lock.read_text()
    marker = folder / INSTALLED
    if marker.is_file() and marker.read_text() == lock:
        say(console, f"{folder} is up to date")
        return folder
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and not (folder / "pyvenv.cfg").is_file():  # a copy of the toolkit's sources, say: what is there would be removed
        raise ConfigError(f"{folder} is there and is no virtual environment; give --dir another folder, or move it away")
    _check_python(python)
    say(console, f"making {folder} from {toolkit.lock}")
    with _set_aside(folder):
        _call([python, "-m", "venv", str(folder)])
        # The hqq package would build CUDA kernels that nothing here uses.
        variables = {**os.environ, "DISABLE_CUDA": "1"}
        pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        _call([*pip, "--requirement", str(toolkit.lock)], variables)
        marker.write_text(lock)
    return folder


def describe(toolkit: Toolkit, parent: Path) -> str:
    """One line: what is there."""
    folder = expanded(parent) / toolkit.name
    found = installed_release(folder, toolkit.package)
    return f"{toolkit.name}: {toolkit.package} {found} in {folder}" if found else f"{toolkit.name}: not in {folder}"


@contextmanager
def _set_aside(folder: Path) -> Iterator[None]:
    """What is at `folder` is gone where the body succeeds, and back where it does not: a method may name the older release."""
    before = folder.with_name(f".{folder.name}.before")
    if before.exists() and not (folder / INSTALLED).is_file():  # a call that was killed left half an environment
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists():
            before.rename(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _check_python(python: str) -> None:
    told = _call([python, "-c", "import sys; print(*sys.version_info[:2])"]).split()
    if tuple(map(int, told)) < LEAST_PYTHON:
        raise ConfigError(
            f"{python} is Python {'.'.join(told)}; the toolkits' locks need {'.'.join(map(str, LEAST_PYTHON))} or newer: give --python"
        )


def _call(command: list[str], variables: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    except OSError as e:
        raise ConfigError(f"{command[0]} cannot be run ({e}); give --python=/path/to/python") from e
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ConfigError(f"`{' '.join(command)}` failed with {done.returncode}:\n{last}")
    return done.stdout
