"""Environments of toolkits: one folder, a virtual environment each, by name. Standard library only; shared with the driver."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Toolkit:
    name: str
    """Of its environment's folder, and in `bitgrid toolkit install NAME`."""
    package: str
    """Distribution whose release is part of a method's key."""

    @property
    def lock(self) -> Path:
        """Its locked requirements."""
        return Path(__file__).parent / "requirements" / f"{self.name}.txt"


TOOLKITS = {t.name: t for t in (Toolkit("hqq", "hqq"), Toolkit("llm_compressor", "llmcompressor"), Toolkit("auto_round", "auto-round"))}


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def installed_release(environment: Path, package: str) -> str | None:
    """Release of a package in an environment, read from its files; None where it is not there."""
    places = [str(p) for p in environment.glob("lib/python*/site-packages")]
    found = next(iter(metadata.distributions(name=package, path=places)), None) if places else None
    return None if found is None else found.version


def problem(environment: Path, toolkit: str, release: str) -> str | None:
    """Why `release` of a toolkit cannot run from this environment, and what to do; None where it can."""
    what = TOOLKITS[toolkit]
    install = f"make it with `bitgrid toolkit install {toolkit}`, or set toolkits_dir= (or BITGRID_TOOLKITS) to the folder that holds it"
    if not python_of(environment).is_file():
        return f"the environment of {toolkit} is not at {environment}; {install}"
    found = installed_release(environment, what.package)
    if found is None:
        return f"{environment} has no package {what.package}; {install}"
    if found != release:
        return (
            f"{environment} holds {what.package} {found}, and the method asks for {release}; "
            f"set method.rounding.params.release={found}, or install that release there"
        )
    return None
