"""The one place of the driver that touches Hydra's internals (hydra-core is pinned): parse, list, load and compose.

`Composer` is one search path with one root config. It caches loaded yaml files, so that composing the base of a grid and
loading each of its options reads a file once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString, ValueType
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orchestrator.errors import ConfigError, unknown_name

HYDRA_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError)
"""What composing raises for wrong input."""
PLUGIN = re.compile(r"hydra/(sweeper|launcher)/([\w-]+)")
BARE_WORD = re.compile(r"[A-Za-z_][\w./-]*")


def first_name(package_or_key: str | None) -> str:
    """`method` of `method.rounding.params`."""
    return (package_or_key or "").split(".", 1)[0]


def override_text(value: Any) -> str:
    """A value as the command line spells it."""
    return str(value).lower() if isinstance(value, bool) else Override._get_value_element_as_str(value)


def make_override(key: str, value: Any, kind: OverrideType = OverrideType.CHANGE) -> Override:
    """The override `key=value` without parsing; `key` may be `group@package`."""
    group, _, package = key.partition("@")
    line = f"{override_prefix(kind)}{key}={override_text(value)}"
    return Override(type=kind, key_or_group=group, value_type=ValueType.ELEMENT, _value=value, package=package or None, input_line=line)


def override_prefix(kind: OverrideType) -> str:
    return {OverrideType.CHANGE: "", OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++", OverrideType.DEL: "~"}[kind]


def plain_key(override: Override) -> str:
    """`group@package` or the dotted key, without its prefix."""
    return override.key_or_group if override.package is None else f"{override.key_or_group}@{override.package}"


def sweep_values(override: Override) -> list[Any]:
    """Every value of a choice, range or glob sweep, quotes kept. Raises ConfigError for an interval."""
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: an interval has no list of values; use choice(...) or range(...), "
            "or a sweeper that searches, as hydra/sweeper=optuna"
        )
    return list(override.sweep_iterator())


def quoted(value: Any) -> Any:
    """A value from yaml, quoted where the command line would read the bare text as something else (`"0123"`)."""
    bare = isinstance(value, str) and (BARE_WORD.fullmatch(value) is None or value.lower() in ("true", "false", "null", "nan", "inf"))
    return QuotedString(value, Quote.single) if bare else value


def as_text(value: str) -> QuotedString:
    """For `override_text`: quoted, so that the command line reads this very text. `${` starts an interpolation all the same."""
    return QuotedString(value, Quote.single)


@contextmanager
def as_config_error(what: str = "") -> Iterator[None]:
    """Hydra's and OmegaConf's exceptions as ConfigError."""
    try:
        yield
    except HYDRA_ERRORS as error:
        plugin = PLUGIN.fullmatch(getattr(error, "missing_cfg_file", None) or "")
        if plugin is not None:
            kind, name = plugin.groups()
            allowed = unknown_name(f"hydra/{kind}", name, getattr(error, "options", None) or ())
            raise ConfigError(f"{allowed}; others come with packages of their own, often named hydra-NAME-{kind}") from error
        cause = f": {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        raise ConfigError(f"{what}{': ' if what else ''}{error}{cause}") from error


@dataclass(frozen=True)
class Base:
    """The composed root: axes at their default options, Hydra's own node included."""

    config: DictConfig
    defaults: tuple[ResultDefault, ...]
    choices: dict[str, str]
    """Group ▸ option chosen by the defaults list and the overrides."""


class Composer:
    """Hydra's loader, seen through what a grid needs."""

    def __init__(self, loader: ConfigLoader, config_name: str, hydra_overrides: Sequence[str] = ()) -> None:
        if not isinstance(loader, ConfigLoaderImpl):
            raise TypeError(f"needs Hydra's own config loader, got {type(loader).__name__}")
        self.loader = loader
        self.config_name = config_name
        self._parsed: dict[str, Override] = {}
        self._options: dict[str, list[str]] = {}
        self._parser = OverridesParser.create(config_loader=loader)
        with warnings.catch_warnings():
            # A search path that does not exist is an error of `at`.
            warnings.simplefilter("ignore", UserWarning)
            _, self.repository = loader._parse_overrides_and_create_caching_repo(config_name, list(hydra_overrides))

    @classmethod
    def at(
        cls,
        main: str = "pkg://conf",
        *,
        config_dir: str | None = None,
        config_name: str = "config",
        hydra_overrides: Sequence[str] = (),
    ) -> Composer:
        """A composer of the shipped `conf`, with `config_dir` searched after it.

        Raises ConfigError where a folder or the root config is not there.
        """
        version.setbase("1.3")
        setup_globals()
        path = create_config_search_path(main)
        if config_dir is not None:
            path.append("command-line", config_dir, anchor=SearchPathQuery("main", None))
        loader = ConfigLoaderImpl(config_search_path=path)
        for source in loader.get_sources():
            if source.provider in ("main", "command-line") and not source.available():
                raise ConfigError(f"configuration folder {source.path!r} is not there; give a folder that holds the groups' yaml files")
        composer = cls(loader, config_name, hydra_overrides)
        for source in composer.repository.get_sources():
            if source.provider.startswith("hydra.searchpath") and not source.available():
                raise ConfigError(
                    f"hydra.searchpath: {source.full_path()} is not there; give folders as file://PATH, or packages as pkg://NAME"
                )
        if not composer.repository.config_exists(config_name):
            places = " nor in ".join(filter(None, (main, config_dir)))
            raise ConfigError(f"root config {config_name!r} is not in {places}; give a name without .yaml")
        return composer

    def parse(self, lines: Iterable[str]) -> list[Override]:
        """Overrides of the command line. Raises ConfigError on bad grammar."""
        parsed = []
        for line in lines:
            if line not in self._parsed:
                self._parsed[line] = self._parse(line)
            parsed.append(self._parsed[line])
        return parsed

    def _parse(self, line: str) -> Override:
        try:
            return self._parser.parse_overrides([line])[0]
        except HYDRA_ERRORS as error:
            # Of Hydra's lexer only the place is told, by a mark below the line; at its end is an address.
            said = str(error).splitlines()[-2 if "\nSee http" in str(error) else -1].strip()
            said = "a character that has no place there" if said == "^" else said
            raise ConfigError(
                f"{line}: {said}; write KEY=VALUE, and text with other than plain characters in quotes inside those of the shell: "
                "\"KEY='VALUE'\""
            ) from error

    def options(self, group: str) -> list[str]:
        """Names of a group's options."""
        if group not in self._options:
            self._options[group] = self.repository.get_group_options(group, ObjectType.CONFIG) if self.is_group(group) else []
        return self._options[group]

    def is_group(self, name: str) -> bool:
        return self.repository.group_exists(name)

    def raw(self, path: str) -> DictConfig | None:
        """A yaml file's own content, defaults list taken out."""
        found = self.repository.load_config(path)
        return found.config if found is not None and isinstance(found.config, DictConfig) else None

    def raw_overridden_packages(self, path: str) -> list[str]:
        """Packages that a file's defaults list changes by `override /group@package`."""
        found = self.repository.load_config(path)
        items = (found.defaults_list or []) if found is not None else []
        return [d.package for d in items if isinstance(d, GroupDefault) and d.override and d.package]

    def base(self, overrides: Sequence[Override]) -> Base:
        """One compose of the root config: group choices and `hydra.*` keys of `overrides`."""
        with as_config_error(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            listed = self._defaults(self.config_name, overrides, prepend_hydra=True)
            config = self.loader._compose_config_from_defaults_list(listed.defaults, self.repository)
            OmegaConf.set_struct(config, True)
            OmegaConf.set_readonly(config.hydra, False)
            for override in listed.config_overrides:
                try:
                    apply_overrides(config, [override])
                except AttributeError as error:  # of OmegaConf 2.3, for a mapping in place of a typed one that is null
                    told = "a mapping cannot be given here at once; give its keys as overrides of their own, or write it into a yaml"
                    raise ConfigError(f"{override.input_line}: {told}") from error
        known = {k: v for k, v in listed.overrides.known_choices.items() if isinstance(v, str)}
        return Base(config, tuple(listed.defaults), known)

    def load(self, path: str, group_overrides: Sequence[Override]) -> tuple[DictConfig, list[ResultDefault]]:
        """A config of a group with its own defaults list, and what it was made of. Raises Hydra's exceptions."""
        listed = self._defaults(path, group_overrides, prepend_hydra=False)
        config = self.loader._compose_config_from_defaults_list(listed.defaults, self.repository)
        return config, listed.defaults

    def compose(self, lines: Sequence[str]) -> DictConfig:
        """Hydra's own compose of the root config. Raises Hydra's exceptions."""
        config = self.loader.load_configuration(self.config_name, list(lines), run_mode=RunMode.RUN, from_shell=False)
        with flag_override(config, ["struct", "readonly"], [False, False]):
            del config["hydra"]
        return config

    def _defaults(self, name: str, overrides: Sequence[Override], *, prepend_hydra: bool) -> DefaultsList:
        return create_defaults_list(self.repository, name, list(overrides), prepend_hydra=prepend_hydra, skip_missing=False)


def apply_overrides(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Hydra's own rules for `key=value`, `+key`, `++key`, `~key`, in place. Raises Hydra's exceptions."""
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)
