"""What the yaml of a method or task says of the code behind it, held to the shipped file of that kind.

A copy in a folder of one's own falls behind when the code changes: workers would refuse its version after calibration has run, and a
wrong `uses_seed` or `reads` would give stages that differ one key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from orchestrator.cell import Option
from orchestrator.errors import ConfigError, unknown_name
from orchestrator.option_keys import COMPONENT

OF_COMPONENTS = tuple(k for k in (*COMPONENT.required, *COMPONENT.optional) if k != "kind")
OF_TASKS = ("version", "needs_reference")


def check_facts(option: Option) -> None:
    """Of a method or task. Raises ConfigError for a fact that is not the shipped one, and for an unknown kind or metric of a task."""
    if option.axis == "task":
        _check_task(f"task={option.name}", option.values)
        return
    rounding, transforms = option.values["rounding"], option.values.get("transforms") or {}
    for path, group, component in [("rounding", "method", rounding), *((f"transforms.{n}", "transform", t) for n, t in transforms.items())]:
        name = f"{group}/{component['kind']}" if component is not None else ""
        if name and (shipped := _shipped(name)) is not None:
            _compare(f"method={option.name}: method.{path}", name, shipped.get("rounding", shipped), component, OF_COMPONENTS)


def _check_task(where: str, task: Mapping[str, Any]) -> None:
    names = [f"task/{path.stem}" for path in sorted(_conf("task").glob("*.yaml"))]
    kinds = {shipped["kind"]: (name, shipped) for name in names if "kind" in (shipped := _shipped(name) or {})}
    if task["kind"] not in kinds:
        raise ConfigError(f"{where}: {unknown_name('task.kind', str(task['kind']), kinds)}")
    name, shipped = kinds[task["kind"]]
    _compare(f"{where}: task", name, shipped, task, OF_TASKS)
    for metric in task["metrics"]:
        if metric not in shipped["metrics"]:
            raise ConfigError(f"{where}: {unknown_name('metric', str(metric), shipped['metrics'])}")
    _compare(f"{where}: task.metrics", name, shipped["metrics"], task["metrics"], list(task["metrics"]))


def _compare(where: str, file: str, shipped: Mapping[str, Any], own: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        # What a file leaves out is the usual, as null, false and an empty list are.
        if (own.get(name) or None) != (shipped.get(name) or None):
            raise ConfigError(
                f"{where}.{name} is {own.get(name)!r}, but {shipped.get(name)!r} in conf/{file}.yaml: it is a fact about the code; take it "
                "from there, best by naming that file in `defaults`, as conf/method/awq.yaml does, so that it stays true"
            )


@lru_cache
def _shipped(name: str) -> Mapping[str, Any] | None:
    path = _conf(f"{name}.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def _conf(name: str) -> Path:
    return Path(str(files("conf"))) / name
