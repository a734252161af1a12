"""Exceptions a caller must tell apart.

BitgridError                    exit code 2 from the command line, message only
├── ConfigError                 a key, option or value that does not exist or is not allowed
│   └── SearchError             there is no grid: a search chooses its cells while it runs
├── PlanError                   a grid that cannot be planned (unknown statistic, every cell impossible, ...)
├── SourceError                 a model or text that is missing, truncated, empty, too short or not for this user
├── StoreError                  the store cannot be used
│   ├── StoreLockedError        another live driver holds it
│   └── StoreVersionError       written by a newer version
├── PairingError                scores that cannot be compared item by item
├── ClusterError                Ray cannot be started or joined
└── TrackingError               MLflow cannot be reached, where that must stop the command

Messages say what was got, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitgridError(Exception):
    """Anything the user can put right; shown without a traceback."""


class ConfigError(BitgridError):
    pass


class SearchError(ConfigError):
    pass


class PlanError(BitgridError):
    pass


class SourceError(BitgridError):
    pass


class StoreError(BitgridError):
    pass


class StoreLockedError(StoreError):
    pass


class StoreVersionError(StoreError):
    pass


class PairingError(BitgridError):
    pass


class ClusterError(BitgridError):
    pass


class TrackingError(BitgridError):
    pass


def nearest(word: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The allowed names closest to `word`, best first."""
    names = sorted(set(allowed))
    lowered = {n.lower(): n for n in reversed(names)}
    return [lowered[m] for m in difflib.get_close_matches(word.lower(), lowered, n=count, cutoff=0.5)]


def unknown_name(what: str, word: str, allowed: Iterable[str]) -> str:
    """`unknown method 'gtpq'; nearest: gptq; allowed: awq, gptq, rtn`."""
    names = sorted(set(allowed))
    close = nearest(word, names)
    hint = f"; nearest: {', '.join(close)}" if close else ""
    return f"unknown {what} {word!r}{hint}; allowed: {', '.join(names)}"
