"""What a configuration may hold: names of axes and options, types of values, the settings that belong to a sweep.

Everything wrong is a ConfigError on the driver, before anything is scheduled, with the nearest valid names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from orchestrator.cell import AXES
from orchestrator.errors import ConfigError, unknown_name
from orchestrator.hydra_bridge import Base, Composer, apply_overrides, as_config_error, override_text, plain_key
from orchestrator.option_keys import COMPONENT, check_keys
from orchestrator.param_files import FILES
from quant.parameters import PARAMETERS, ROUNDINGS, TRANSFORMS, refusal
from quant.scheme import KV_CODEBOOKS, KV_KINDS, KV_MODES, Granularity, Scheme
from workers.request import Hints
from workers.specs import DTYPES, PROPAGATIONS, SAMPLINGS, WINDOWS, from_json
from workers.toolkits.environments import TOOLKITS

NOT_SWEPT = {
    "cluster": "where stages run changes no result, and one sweep runs on one cluster",
    "tracking": "all runs of a sweep go to one place, or they cannot be compared there",
    "store": "one store holds the whole sweep, so that cells share stages",
    "models_dir": "the folder serves every model of the sweep; sweep model=a,b instead",
    "data_dir": "the folder serves every text of the sweep; sweep task=a,b or calibration=a,b instead",
    "toolkits_dir": "the folder serves every toolkit of the sweep; sweep method.rounding.params.release=a,b instead",
    "sweep": "a sweep has one name and one set of rules; run the command once per named sweep",
    "site_statistics": "it adds a section to the report of the whole sweep and changes no result",
    "measure": "it adds timings to the report of the whole sweep and changes no result",
    "workload": "all variants of a sweep are timed alike, or their times cannot be compared",
    "hints": "hints change how stages run, never a result",
    "hydra": "Hydra's own settings hold for the whole sweep",
}
"""Settings of a sweep, with the reason why they are not axes."""

SWEEP_KEYS = ("name", "exclude", "only_if", "zip", "extra")
HINTS = tuple(f.name for f in fields(Hints))

FACTS = (*COMPONENT.required, *COMPONENT.optional, "needs_reference", "metrics")
"""Keys of methods and tasks that tell planning about the code. Changing them would not change the code."""

CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("model", "dtype"): DTYPES,
    ("method", "propagation"): PROPAGATIONS,
    ("method", "rounding.toolkit"): tuple(TOOLKITS),
    ("calibration", "sampling"): SAMPLINGS,
    ("calibration", "text.split"): ("rows", "paragraphs", "whole", "endoftext"),
    ("task", "text.split"): ("rows", "paragraphs", "whole", "endoftext"),
    ("task", "windows"): WINDOWS,
    ("scheme", "weight.granularity"): tuple(g.value for g in Granularity),
    ("scheme", "activation.granularity"): tuple(g.value for g in Granularity),
    ("scheme", "kv.kind"): tuple(KV_KINDS),
    ("scheme", "kv.mode"): KV_MODES,
    ("scheme", "kv.codebook"): KV_CODEBOOKS,
}
"""Words that workers and quantization know, by axis and key inside the option (`*`: any key). Tested against their code."""

_SOURCE = {"text.path": "FILE", "text.file": "FILE", "text.asset": "FILE"}
TEXTS: dict[str, dict[str, str]] = {
    "settings": {
        **dict.fromkeys(("store", "models_dir", "data_dir", "toolkits_dir"), "FOLDER"),
        **{"cluster.address": "ADDRESS", "cluster.namespace": "NAME", "tracking.uri": "ADDRESS"},
        **{"tracking.artifact_location": "ADDRESS", "sweep.name": "NAME"},
    },
    "model": {"path": "FOLDER", "folder": "FOLDER", "asset": "FOLDER"},
    "calibration": _SOURCE,
    "task": _SOURCE,
}
"""Axis ▸ key inside the option ▸ what is to be there. Null in a yaml, it tells no type of its own."""

IDLE: dict[str, tuple[str, Any]] = {"clip": ("kind", "none"), "clip_output": ("kind", "none")}
"""Kind of a transform ▸ the parameter and the value with which it changes nothing: planning leaves it out, with the same stages."""
_DESCENT = {"iters": ("kind", "learned"), "lr": ("kind", "learned")}
READ_WITH: dict[str, dict[str, tuple[str, Any]]] = {"clip": _DESCENT, "clip_output": _DESCENT}
"""Kind of a transform ▸ a parameter that is read only where another has this value. Elsewhere no key has it."""


def help_text() -> str:
    """Axes, settings groups and named sweeps with their shipped options, for `bitgrid plan --help`."""
    composer = Composer.at()
    lines = ["axes (sweep with -m and commas, as in: bitgrid run -m method=rtn,gptq scheme=glob(w4*)):"]
    lines += [f"  {axis:<12} {', '.join(composer.options(axis))}" for axis in AXES]
    lines += ["settings of the whole sweep:"]
    lines += [f"  {group:<12} {', '.join(composer.options(group))}" for group in ("cluster", "tracking", "sweep")]
    return "\n".join(lines)


def refuse_unknown_roots(composer: Composer, base: Base) -> None:
    """A misspelt root key in a sweep's own yaml would otherwise be carried along unseen. Known are keys of the root, and of files beside it
    that it builds on (`defaults: [config, _self_]`)."""
    roots = {composer.config_name} | {d.config_path for d in base.defaults if d.config_path and "/" not in d.config_path}
    allowed = {str(k) for name in roots for k in (composer.raw(name) or {})} | {
        group for group in base.choices if "/" not in group and "@" not in group
    }
    for key in base.config:
        if key != "hydra" and str(key) not in allowed:
            raise ConfigError(unknown_name("root key", str(key), allowed))
    sweep = base.config.get("sweep")
    for key in sweep if isinstance(sweep, DictConfig) else ():
        if key not in SWEEP_KEYS:
            raise ConfigError(unknown_name("key of sweep", str(key), SWEEP_KEYS))


def settings_of(base: Base, overrides: Sequence[Override]) -> DictConfig:
    """The root config without axes and Hydra's node, overrides applied, not yet resolved."""
    kept = [str(k) for k in base.config if k != "hydra" and k not in AXES]
    settings = OmegaConf.masked_copy(base.config, kept)
    OmegaConf.set_struct(settings, True)
    for override in overrides:
        check_override(settings, override, "settings")
        with as_config_error():
            apply_overrides(settings, [override])
    return settings


def resolved_settings(settings: DictConfig) -> dict[str, Any]:
    """Plain settings. A setting that depends on an axis is refused: it would differ from cell to cell. So is an unknown hint, and a
    sweep without cluster, tracking or store."""
    with as_config_error("settings hold for the whole sweep and cannot read an axis"):
        plain = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    hints = plain.get("hints") or {}
    if not isinstance(hints, dict):
        raise ConfigError(f"hints is {hints!r}; expected a mapping, as in conf/config.yaml")
    for key in hints:
        if key not in HINTS:
            raise ConfigError(unknown_name("key of hints", str(key), HINTS))
    for group, example in (("cluster", "in_process"), ("tracking", "none")):
        if not isinstance(plain.get(group), dict) or "kind" not in plain[group]:
            got = f"{group}={plain[group]!r} names no kind" if group in plain else f"{group} is missing"
            raise ConfigError(f"{got}; every sweep has one: give {group}=NAME, such as {group}={example}")
    if "store" not in plain:
        raise ConfigError("store is missing; every sweep has one: give store=FOLDER")
    if not isinstance(plain.get("sweep") or {}, dict):
        raise ConfigError(f"sweep is {plain['sweep']!r}; expected a mapping, as in conf/sweep/none.yaml; a name goes into sweep.name")
    resolved = {str(k): v for k, v in plain.items()}
    _check_texts("settings", "", resolved)
    if isinstance(resolved.get("budget"), float) and not math.isfinite(resolved["budget"]):
        raise ConfigError(f"budget={resolved['budget']}; give the average stored bits per weight, as budget=3.2")
    return resolved


def check_override(config: DictConfig, override: Override, where: str) -> None:
    """An override's key must exist in `config` and its value have the type of the value there.

    `+` adds keys only to free mappings: those that are empty or null in the yaml.
    """
    path = plain_key(override)
    parts = path.split(".")
    if parts[0] in ("method", "task") and not {"params", "text"} & set(parts) and set(FACTS) & set(parts):
        raise ConfigError(
            f"{override.input_line}: {parts[-1]} is a fact about the code behind {where}, not a choice; "
            f"choose another {parts[0]}, or write an option file for it in conf/{parts[0]}/"
        )
    node: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
            return _check_below_leaf(node, parts, depth, where, override)
        below = node._get_node(part, validate_access=False)
        if below is None:
            if (override.is_add() or override.is_force_add()) and len(node) == 0:
                return
            raise ConfigError(_unknown_key(parts[:depth], part, node, where, override))
        node = below
    if override.is_delete():
        return
    value = override.value()
    if isinstance(node, DictConfig) and isinstance(value, dict) and not node._is_none():
        for key, below in value.items() if len(node) else ():
            check_override(config, _below(override, str(key), below), where)
        return
    check_type(path, _plain(node), value)


def _below(override: Override, key: str, value: Any) -> Override:
    line = f"{override.key_or_group}.{key}={override_text(value)}"
    return Override(override.type, f"{override.key_or_group}.{key}", override.value_type, value, None, line)


def _check_below_leaf(node: Any, parts: list[str], depth: int, where: str, override: Override) -> None:
    if isinstance(node, ListConfig) or (override.is_add() or override.is_force_add()) or OmegaConf.is_config(node):
        return
    above = ".".join(parts[:depth])
    raise ConfigError(f"{override.input_line}: {above} of {where} is the value {node!s}, not a mapping; use {above}=VALUE")


def _unknown_key(above: Sequence[str], word: str, node: DictConfig, where: str, override: Override) -> str:
    if len(node) == 0:
        return f"{override.input_line}: {'.'.join(above)} of {where} is an empty mapping without key {word!r}"
    allowed = [str(k) for k in node]
    if not above:
        return unknown_name("key", word, [*allowed, *AXES])
    message = unknown_name(f"key of {'.'.join(above)} in {where}", word, allowed)
    if override.is_add() or override.is_force_add():
        message += " (+ adds keys only to mappings that are empty in the yaml)"
    return message


def _plain(node: Any) -> Any:
    if OmegaConf.is_config(node):
        return None if node._is_none() or node._is_interpolation() or node._is_missing() else OmegaConf.to_container(node, resolve=False)
    if node._is_interpolation() or node._is_missing():
        return None
    return node._value()


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ConfigError for what is no whole number from `least` on, to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise ConfigError(f"{name}={value!r}; give a whole number from {least}" + ("" if most is None else f" to {most}"))


def check_type(path: str, default: Any, value: Any) -> None:
    """The value must be of the yaml value's type; null in the yaml takes anything, and null is a value for anything."""
    if default is None or value is None or (isinstance(value, str) and "${" in value):
        return
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, (int, float))
    else:
        fits = isinstance(value, type(default))
    if fits:
        return
    hint = f"; quote it for text: {path}=\\'{value}\\'" if isinstance(default, str) and isinstance(value, (int, float)) else ""
    raise ConfigError(f"{path}={override_text(value)} is {_kind(value)}, expected {_kind(default)} like {override_text(default)}{hint}")


def _check_texts(owner: str, prefix: str, values: Mapping[str, Any]) -> None:
    """Text or null."""
    for path, example in TEXTS.get(owner, {}).items():
        for value in _at(values, path.split(".")):
            check_type(prefix + path, example, value)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)


def check_option(axis: str, name: str, values: Mapping[str, Any]) -> None:
    """Keys; then values against the specs' own types: words from closed lists, and the scheme's dataclasses."""
    check_keys(axis, name, values)
    _check_texts(axis, f"{axis}.", values)
    for (owner, path), allowed in CHOICES.items():
        for value in _at(values, path.split(".")) if owner == axis else ():
            if isinstance(value, str) and value not in allowed:
                raise ConfigError(f"{axis}={name}: {unknown_name(f'{axis}.{path}', value, allowed)}")
    if axis == "method":
        _check_method(name, values)
    if axis == "scheme":
        parts = {part: values[part] for part in ("weight", "activation", "kv") if part in values}
        try:
            from_json(Scheme, parts)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"scheme={name}: {error}") from error


def _check_method(name: str, method: Mapping[str, Any]) -> None:
    """Kinds and parameters of the components, and of the rounding where overrides change it."""
    kind, overrides = method["rounding"]["kind"], method.get("overrides")
    components = [("rounding", method["rounding"], ROUNDINGS)]
    components += [(f"transforms.{n}", t, TRANSFORMS) for n, t in (method.get("transforms") or {}).items() if t is not None]
    for path, component, kinds in components:
        if component["kind"] not in kinds:
            raise ConfigError(f"method={name}: {unknown_name(f'method.{path}.kind', str(component['kind']), kinds)}")
        check_params(f"method={name}", f"method.{path}.params", component["kind"], component.get("params") or {}, files=True)
    for pattern, changes in overrides.items() if isinstance(overrides, Mapping) else ():
        if isinstance(changes, Mapping):
            check_params(f"method={name}", f"method.overrides.{pattern}", kind, changes)


def check_params(where: str, path: str, kind: str, params: Mapping[str, Any], *, files: bool = False) -> None:
    """Raises ConfigError for a parameter that a component of this kind has not, or a value that it does not take. With `files` paths may
    stand where files of bits are read (`param_files`)."""
    known = PARAMETERS[kind]
    for name, value in params.items():
        if name not in known:
            raise ConfigError(f"{where}: {unknown_name(f'key of {path}', str(name), known)}")
        if files and name in FILES and isinstance(value, str):
            continue
        words = known[name].words
        if words and isinstance(value, str) and value not in words:
            raise ConfigError(f"{where}: {unknown_name(f'{path}.{name}', value, words)}")
        shown = f"{path}.{name}={override_text(value)}"
        reason = refusal(kind, name, value, shown)
        if reason is None and value == math.inf:
            reason = f"{shown} has no place in a key, which digests JSON; give a large number, as 1e9"
        if reason is not None:
            raise ConfigError(f"{where}: {reason}")


def _at(values: Any, path: Sequence[str]) -> list[Any]:
    """What is at the path; several values below `*`."""
    if not path:
        return [values]
    if not isinstance(values, Mapping):
        return []
    below = list(values.values()) if path[0] == "*" else [values[path[0]]] if path[0] in values else []
    return [found for value in below for found in _at(value, path[1:])]
