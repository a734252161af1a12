"""Folders as users name them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import ConfigError, SourceError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""`s3://bucket`, of which pathlib keeps one slash. A drive of Windows has a single letter."""


def expanded(path: str | Path) -> Path:
    """`~` as the user's home. One that nobody knows stays, as in a shell, so that whoever looks there finds nothing."""
    return Path(os.path.expanduser(path))


def real(path: str | Path) -> Path:
    """Absolute, `~` expanded and links followed; of a link to itself its own path, for which `Path.resolve` raises RuntimeError."""
    return Path(os.path.realpath(expanded(path)))


def place(said: str, path: str | Path) -> Path:
    """The absolute folder that is to be written. `said` stands before it in errors, as `store=`. Raises ConfigError where it would be made
    under a name that nobody meant."""
    if _ADDRESS.match(str(path)):
        raise ConfigError(f"{said}{path} is an address, and bitgrid reads and writes folders; give one, such as that where it is mounted")
    found = expanded(path)
    if str(found).startswith("~"):
        raise ConfigError(f"{said}{path}: no home of {found.parts[0]} is known here; write the folder out")
    return real(found)


@contextmanager
def denied_told() -> Iterator[None]:
    """A model, text or store that this user may not read, or write, raises SourceError, with what to do."""
    try:
        yield
    except PermissionError as e:
        raise SourceError(f"{e}; let its owner give you access, or name another") from e
