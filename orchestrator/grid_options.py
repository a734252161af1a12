"""Choices ▸ options: each yaml file loaded once, each distinct value made once, without composing the root again.

Only what stays inside an axis's own package can be loaded alone. Anything else raises `ReachesOutside`, and the whole grid
goes through Hydra's compose instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from orchestrator.cell import AXES, Option
from orchestrator.config import check_option, check_override
from orchestrator.errors import ConfigError
from orchestrator.grid_axes import Change, Choice
from orchestrator.hydra_bridge import HYDRA_ERRORS, Base, Composer, apply_overrides, first_name

_PLAIN_REFERENCE = re.compile(r"\$\{(?:[\w.\[\]-]+|oc\.env:[^${}]*)\}")
"""A reference to a node, or to an environment variable; other resolvers may look anywhere."""


class ReachesOutside(Exception):
    """An option that cannot be loaded alone; the message says why."""


@dataclass(frozen=True)
class _Template:
    """An option's file with the files of its own defaults list, before value overrides."""

    config: DictConfig
    """{axis: values}, in struct mode."""
    plain: dict[str, Any] | None
    """The resolved values, where nothing in them refers to another node."""


class OptionTable:
    """Options by value: one object per distinct (axis, file, values)."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str, str], Option] = {}

    def add(self, choice: Choice, values: dict[str, Any]) -> Option:
        """The option of these values; checked when first seen. The order of a mapping is part of its value: the last of two overrides that
        match wins, and transforms follow each other."""
        key = (choice.axis, choice.file, json.dumps(values, default=repr))
        if key not in self._made:
            check_option(choice.axis, choice.name, values)
            self._made[key] = Option(choice.axis, choice.name, values)
        return self._made[key]


class OptionLoader:
    """Loads options of one composer; `settings` are what an option may refer to outside itself."""

    def __init__(self, composer: Composer, settings: DictConfig, table: OptionTable) -> None:
        self._composer = composer
        self._table = table
        self._settings = DictConfig(OmegaConf.to_container(settings, resolve=False))
        self._templates: dict[tuple[str, str, tuple[str, ...]], _Template] = {}
        self._options: dict[Choice, Option] = {}

    def option(self, choice: Choice) -> Option:
        """Raises ReachesOutside, or ConfigError for a key or value that is wrong."""
        found = self._options.get(choice)
        if found is None:
            found = self._table.add(choice, self._values(choice))
            self._options[choice] = found
        return found

    def _values(self, choice: Choice) -> dict[str, Any]:
        groups = [c for c in choice.changes if c.is_group]
        values = [c for c in choice.changes if not c.is_group]
        template = self._template(choice.axis, choice.file, groups)
        for change in values:
            check_override(template.config, change.override, f"{choice.axis} {choice.file}")
            _refuse_resolvers(change.text, choice)
        if template.plain is None or not all(_is_plain_set(template.plain, c) for c in values):
            return self._apply(template, choice, values)
        plain = template.plain
        for change in values:
            plain = _with(plain, change.override.key_or_group.split(".")[1:], change.override.value())
        return plain

    def _apply(self, template: _Template, choice: Choice, changes: Sequence[Change]) -> dict[str, Any]:
        config = DictConfig({choice.axis: template.config[choice.axis]})
        OmegaConf.set_struct(config, True)
        try:
            apply_overrides(config, [c.override for c in changes])
        except HYDRA_ERRORS as error:
            raise ConfigError(f"{choice.axis}={choice.file}: {error}") from error
        return self._resolve(choice.axis, choice.file, config)

    def _template(self, axis: str, file: str, groups: Sequence[Change]) -> _Template:
        key = (axis, file, tuple(c.text for c in groups))
        if key not in self._templates:
            for change in groups:
                if change.override.type is OverrideType.ADD:
                    raise ReachesOutside(f"{change.text} adds to the defaults list of the root config")
            try:
                config, made_of = self._composer.load(f"{axis}/{file}", [c.override for c in groups])
            except HYDRA_ERRORS as error:
                if groups:
                    # Without them it composes, or says why not.
                    self._template(axis, file, ())
                    wanted = " ".join(c.text for c in groups)
                    raise ConfigError(f"{axis}={file} does not take {wanted}: {error}") from error
                raise ReachesOutside(f"{axis}/{file}.yaml cannot be composed alone: {error}") from error
            for default in made_of:
                if first_name(default.package) != axis:
                    raise ReachesOutside(f"{axis}/{file}.yaml puts {default.config_path} into package {default.package or '_global_'!r}")
            OmegaConf.set_struct(config, True)
            text = OmegaConf.to_yaml(config)
            if "${" in text and _PLAIN_REFERENCE.sub("", text).count("${"):
                raise ReachesOutside(f"{axis}/{file}.yaml uses a resolver that may read outside the option")
            plain = None if "${" in text or "???" in text else self._resolve(axis, file, config)
            self._templates[key] = _Template(config, plain)
        return self._templates[key]

    def _resolve(self, axis: str, file: str, config: DictConfig) -> dict[str, Any]:
        root = self._settings
        try:
            root[axis] = config[axis]
            return plain_values(root, axis, file)
        except InterpolationResolutionError as error:
            raise ReachesOutside(f"{axis}/{file}.yaml refers outside its package: {_first_line(error)}") from error
        finally:
            root.pop(axis, None)


def plain_values(config: DictConfig, axis: str, file: str) -> dict[str, Any]:
    """The resolved values of an axis; ConfigError where a mandatory value is missing or the option is no mapping."""
    try:
        values = OmegaConf.to_container(config[axis], resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{axis}={file} needs a value: {error.full_key} is ???; give it on the command line") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{axis}={file} is {type(values).__name__}, expected a mapping")
    return {str(k): v for k, v in values.items()}


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error).strip().splitlines()[0]


def _refuse_resolvers(text: str, choice: Choice) -> None:
    if "${" in text and _PLAIN_REFERENCE.sub("", text).count("${"):
        raise ReachesOutside(f"{text} of {choice.axis}={choice.file} uses a resolver that may read outside the option")


def _is_plain_set(values: Any, change: Change) -> bool:
    """A number, word, true, false or null put where a yaml key is, so that Hydra would do no more than set it."""
    value = change.override.value()
    if isinstance(value, (list, dict)) or (isinstance(value, str) and ("${" in value or value == "???")):
        return False
    *above, last = change.override.key_or_group.split(".")[1:] or [""]
    for part in above:
        values = values.get(part) if isinstance(values, dict) else None
    return change.override.type is OverrideType.CHANGE and isinstance(values, dict) and last in values


def _with(values: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy along `path` only: options of one file share all other values."""
    below = value if len(path) == 1 else _with(values[path[0]], path[1:], value)
    return {**values, path[0]: below}


def reaches_in(composer: Composer, base: Base) -> str | None:
    """Why an axis is changed from outside its own option (a sweep file that sets `model.dtype`, say), or None."""
    outer = {d.config_path for d in base.defaults if first_name(d.package) not in AXES} | {composer.config_name}
    for default in base.defaults:
        path = str(default.config_path)
        root = first_name(default.package)
        if root == "hydra":
            continue
        if root in AXES:
            own = default.package == root and path == f"{root}/{base.choices.get(root)}"
            if default.parent in outer and not own:
                return f"{default.parent} puts {path} into {default.package}"
            continue
        for package in composer.raw_overridden_packages(path):
            if first_name(package) in AXES:
                return f"{path} overrides a default of {package}"
        raw: Mapping[Any, Any] = (composer.raw(path) or {}) if not default.package else {}
        for key in raw:
            if key in AXES:
                return f"{path} sets {key} from outside"
    return None
