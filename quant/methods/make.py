"""Methods made from names and parameters, with errors that say what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from quant.methods.base import ModelTransform, Rounding, Transform
from quant.methods.registry import MODEL_TRANSFORMS, ROUNDERS, ROUNDINGS, TOOLKIT_METHODS, TRANSFORMS
from quant.methods.toolkits import ToolkitMethod
from quant.methods.tuner import BlockTuner

T = TypeVar("T")


def rounding(name: str, params: Mapping[str, Any], *, version: int | None = None) -> Rounding:
    """A rounding with its parameters. Raises ValueError for a wrong name, parameter, type or version."""
    made: Rounding = _make(ROUNDINGS, "rounding", name, params, version)
    return made


def transform(name: str, params: Mapping[str, Any], *, version: int | None = None) -> Transform:
    """A transform with its parameters. Raises ValueError for a wrong name, parameter, type or version."""
    made: Transform = _make(TRANSFORMS, "transform", name, params, version)
    return made


def model_transform(name: str, params: Mapping[str, Any], *, version: int | None = None) -> ModelTransform:
    """A transform of a whole model with its parameters. Raises ValueError for a wrong name, parameter, type or version."""
    made: ModelTransform = _make(MODEL_TRANSFORMS, "model transform", name, params, version)
    return made


def rounding_or_tuner(name: str, params: Mapping[str, Any], *, version: int | None = None) -> Rounding | BlockTuner:
    """What stands in a method's `rounding`. Raises ValueError for a wrong name, parameter, type or version."""
    made: Rounding | BlockTuner = _make(ROUNDERS, "rounding", name, params, version)
    return made


def toolkit_method(name: str, params: Mapping[str, Any], *, version: int | None = None) -> ToolkitMethod:
    """What stands there where another toolkit is to quantize. Raises ValueError for a wrong name, parameter, type or version."""
    made: ToolkitMethod = _make(TOOLKIT_METHODS, "toolkit's method", name, params, version)
    return made


def unknown(what: str, name: str, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not one of `allowed`, with the nearest."""
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    choose = f"choose one of {', '.join(names)}" if names else "there are none"
    return ValueError(f"{what} {name!r} is unknown; {choose}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def param_names(cls: type[Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _make(table: Mapping[str, type[T]], what: str, name: str, params: Mapping[str, Any], version: int | None) -> T:
    if name not in table:
        raise unknown(what, name, table)
    cls: Any = table[name]
    if version is not None and version != cls.version:
        raise ValueError(f"{what} {name} has version {cls.version} here; version {version} was asked for: use the release that wrote it")
    for key in params:
        if key not in param_names(cls):
            raise unknown(f"parameter of {name}", key, param_names(cls))
    made: T = cls(**{k: tuple(v.items()) if isinstance(v, Mapping) else v for k, v in params.items()})
    return made
