"""How a grid was asked for: everything that composing it again needs, also from another folder on another day."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.cell import Cell, Grid
from orchestrator.errors import ConfigError
from orchestrator.grid import compose_jobs, compose_with
from orchestrator.hydra_bridge import Composer
from orchestrator.places import real
from orchestrator.store import usual_place

CONF = "pkg://conf"
"""The shipped configuration, as Hydra names it."""


def program() -> str:
    """How this bitgrid is called from here: by name where PATH finds it, else by the path of its environment."""
    own = Path(sys.executable).with_name("bitgrid")
    found = shutil.which("bitgrid")
    if found is not None and Path(found).absolute() == own:
        return "bitgrid"
    if own.is_file():
        return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
    return f"{sys.executable} -m orchestrator.cli"


def call(words: str, store: Path) -> str:
    """A verb and its arguments as they are typed here; `store` is named where the verb would look elsewhere."""
    usual = real(usual_place())
    return f"{program()} {words}" + ("" if store.resolve() == usual else f" --store {shlex.quote(str(store))}")


def read_flags(prog: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Those of Hydra's flags that change what is composed; and the rest: overrides, and flags that only Hydra knows."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath)
    parser.add_argument("--config-name", "-cn", default="config")
    # Before Python 3.12 a lone -c would be taken for the start of -cd and -cn.
    return parser.parse_known_args(["--cfg" if a == "-c" else a for a in arguments])


def refuse_store_flag(arguments: Sequence[str]) -> None:
    """Of a verb that plans. Raises ConfigError."""
    given = next((a for a in arguments if a.partition("=")[0] == "--store"), None)
    if given is not None:
        raise ConfigError(f"{given} is for verbs on a sweep that is there; run, plan and explain take the store as a setting: store=FOLDER")


SHOWS = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
"""Hydra's flags with which it shows something of what is composed, and runs nothing."""
HELP = ("--help", "-h", "--hydra-help")
MODES = ("--run", "-r", *SHOWS)
"""Those that say what it is to do, `-m` being one more."""
WITH_CFG = ("--package", "-p", "--resolve")
"""Hydra's flags that say more of what `--cfg` shows."""


def shows_only(flags: Sequence[str]) -> bool:
    """Whether Hydra is to show something, and run nothing."""
    return any(f.partition("=")[0] in (*SHOWS, *HELP) for f in flags)


def refuse_two_modes(multirun: bool, flags: Sequence[str]) -> None:
    """Of the modes, Hydra takes one; and flags of a mode that was not asked for would be passed over. Raises ConfigError."""
    asked = (["-m"] if multirun else []) + [f for f in flags if f.partition("=")[0] in MODES]
    idle = next((f for f in flags if f.partition("=")[0] in WITH_CFG), None)
    if idle is not None and not any(f.partition("=")[0] in ("--cfg", "-c", "--help", "-h") for f in flags):
        raise ConfigError(f"{idle} is for what --cfg shows; give --cfg=job too, or leave it out")
    if len(asked) > 1:
        raise ConfigError(f"got {' and '.join(asked)}; Hydra takes one of them, and shows a single job; `bitgrid plan -m` shows a grid")


@dataclass(frozen=True)
class Command:
    """A command line that composes a grid, as it was given."""

    overrides: tuple[str, ...]
    """Of the command line, `hydra.*` ones included."""
    multirun: bool
    jobs: tuple[tuple[str, ...], ...] | None = None
    """The overrides of each cell, where another sweeper than bitgrid's chose the cells; `overrides` are what it was asked then."""
    main: str = CONF
    """Root of the configuration (Hydra's --config-path)."""
    config_dir: str | None = None
    """Searched after it (--config-dir)."""
    config_name: str = "config"
    folder: str = field(default_factory=os.getcwd)
    """Where the command ran: relative paths start there."""

    @classmethod
    def of_flags(cls, given: argparse.Namespace, overrides: Sequence[str]) -> Command:
        """Of what `read_flags` read."""
        folder = None if given.config_dir is None else f"file://{given.config_dir}"
        return cls(tuple(overrides), given.multirun, config_dir=folder, config_name=given.config_name)

    @classmethod
    def of_hydra(cls, hydra: Any, overrides: Sequence[str], *, multirun: bool, jobs: Sequence[Sequence[str]] | None = None) -> Command:
        """`hydra`: the node of that name in a composed configuration. The mode that Hydra adds itself is left out."""
        own = [str(o) for o in hydra.overrides.hydra if not str(o).startswith("hydra.mode=")]
        places = {s.provider: f"{s.schema}://{s.path}" for s in hydra.runtime.config_sources}
        return cls(
            overrides=(*own, *overrides),
            multirun=multirun,
            jobs=None if jobs is None else tuple((*own, *job) for job in jobs),
            main=places.get("main", CONF),
            config_dir=places.get("command-line"),
            config_name=str(hydra.job.config_name),
        )

    def composer(self) -> Composer:
        """Raises ConfigError where a folder or the root config is not there."""
        own = [o for o in self.overrides if o.lstrip("+~").startswith(("hydra.", "hydra/"))]
        return Composer.at(self.main, config_dir=self.config_dir, config_name=self.config_name, hydra_overrides=own)

    def compose(self) -> Grid:
        """Raises ConfigError."""
        if self.jobs is not None:
            return self.compose_jobs()[0]
        return compose_with(self.composer(), self.overrides, multirun=self.multirun)

    def compose_jobs(self) -> tuple[Grid, list[Cell]]:
        """The grid of the jobs, and the cell of each. Raises ConfigError."""
        return compose_jobs(self.composer(), self.jobs or (), self.overrides)

    def with_overrides(self, more: Sequence[str]) -> Command:
        """Settings that win over what was given."""
        jobs = None if self.jobs is None else tuple((*job, *more) for job in self.jobs)
        return replace(self, overrides=(*self.overrides, *more), jobs=jobs)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Command:
        jobs = value["jobs"]
        given = {**value, "overrides": tuple(value["overrides"]), "jobs": None if jobs is None else tuple(map(tuple, jobs))}
        return Command(**given)
