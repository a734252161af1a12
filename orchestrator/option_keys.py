"""What an option's yaml may hold, key by key: a misspelt key would otherwise count as left out.

Names of parameters are known to the methods themselves, and fields of a scheme's parts to `quant.scheme`: they are not listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Keys:
    """Of one mapping."""

    required: tuple[str, ...] = ()
    """Must be there and not null."""
    optional: tuple[str, ...] = ()
    below: Mapping[str, Keys] = field(default_factory=dict)
    """Of values that are mappings themselves, or null where the key is not required."""
    each: Keys | None = None
    """Of every value, where names are free; then there is nothing else."""
    null: bool = False
    """Such values may be null."""


_ANY = Keys()
_FREE = Keys(each=_ANY)
COMPONENT = Keys(
    ("kind", "version", "needs"),
    ("reads", "uses_seed", "supports", "for_activations", "maps", "feeds_text", "working_set", "toolkit"),
    {"params": _FREE},
)
"""Of a method: all but its parameters are facts about the code."""
_TEXT = Keys(
    optional=("file", "asset", "path", "field", "split", "join", "documents", "skip_documents"),
    below={"hub": Keys(("id",), ("config", "split", "revision", "data_files"))},
)
OPTIONS: dict[str, Keys] = {
    "model": Keys(optional=("folder", "asset", "path", "dtype"), below={"hub": Keys(("id",), ("revision",))}),
    "method": Keys(("rounding",), ("propagation", "overrides"), {"rounding": COMPONENT, "transforms": Keys(each=COMPONENT, null=True)}),
    "scheme": Keys(optional=("weight", "activation", "kv", "overrides", "auto")),
    "calibration": Keys(("text",), ("samples", "sequence_length", "seed", "sampling"), {"text": _TEXT}),
    "task": Keys(
        ("kind", "version", "text", "primary", "metrics"),
        ("needs_reference", "windows"),
        {"text": _TEXT, "metrics": Keys(each=Keys(("higher_is_better",))), "params": _FREE},
    ),
    "replicate": Keys(("seed",)),
}
"""Axis ▸ keys of its options."""


def check_keys(axis: str, name: str, values: Any) -> None:
    """Raises ConfigError for a key that is unknown or missing, and for a value that should be a mapping."""
    _check(f"{axis}={name}", axis, OPTIONS[axis], values)


def _check(where: str, path: str, keys: Keys, values: Any) -> None:
    if keys is _ANY:
        return
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {path} is {values!r}; expected a mapping, as in the options of conf/")
    below = keys.below if keys.each is None else dict.fromkeys(values, keys.each)
    allowed = [*keys.required, *keys.optional, *below]
    for key in values:
        if key not in allowed:
            raise ConfigError(f"{where}: {unknown_name(f'key of {path}', str(key), allowed)}")
    for key in keys.required:
        if values.get(key) is None:
            raise ConfigError(f"{where}: {path} needs a value for {key!r}; it has {', '.join(map(str, values)) or 'no key'}")
    for key, inner in below.items():
        if values.get(key) is not None or (keys.each is not None and not keys.null):
            _check(where, f"{path}.{key}", inner, values[key])
