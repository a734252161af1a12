"""The ledger: one SQLite index of what is quick to look up and can always be rebuilt from the store.

Tables: durations (seconds of committed stages, for estimates) and flushed (digest of what a tracker was last told of a sweep).
Deleting it costs nothing but time: `bitgrid reconcile` fills it again. For the same reason it is never an error that a line
cannot be written.
"""

from __future__ import annotations

import contextlib
import sqlite3
from contextlib import closing
from pathlib import Path
from types import TracebackType

_SCHEMA = """
CREATE TABLE IF NOT EXISTS durations (key TEXT PRIMARY KEY, kind TEXT, model TEXT, what TEXT, seconds REAL);
CREATE TABLE IF NOT EXISTS flushed (sweep TEXT, tracker TEXT, digest TEXT, PRIMARY KEY (sweep, tracker));
"""

Durations = dict[tuple[str, str, str], float]
"""(kind, model digest, method or task) ▸ mean seconds of the latest 20 stages."""


class Ledger:
    """Opened by one driver at a time (the holder of the store's lease)."""

    def __init__(self, path: Path) -> None:
        try:
            self._connection = _open(path)
        except sqlite3.OperationalError:
            raise  # locked, or no place to write: not broken
        except sqlite3.DatabaseError:
            # Only an index: a broken one is replaced.
            path.unlink()
            self._connection = _open(path)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()

    def add_duration(self, key: str, kind: str, model: str, what: str, seconds: float) -> None:
        with contextlib.suppress(sqlite3.OperationalError), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO durations VALUES (?, ?, ?, ?, ?)", (key, kind, model, what, seconds))

    def durations(self) -> Durations:
        return _durations(self._connection)

    def flushed(self, sweep: str, tracker: str) -> str | None:
        row = self._connection.execute("SELECT digest FROM flushed WHERE sweep = ? AND tracker = ?", (sweep, tracker)).fetchone()
        return None if row is None else str(row[0])

    def set_flushed(self, sweep: str, tracker: str, digest: str) -> None:
        with contextlib.suppress(sqlite3.OperationalError), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO flushed VALUES (?, ?, ?)", (sweep, tracker, digest))


def read_durations(path: Path) -> Durations:
    """Of a ledger that a driver may be writing, without touching it; empty where there is none to read."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            return _durations(connection)
    except sqlite3.DatabaseError:
        return {}


def _durations(connection: sqlite3.Connection) -> Durations:
    rows = connection.execute("SELECT kind, model, what, seconds FROM durations ORDER BY rowid DESC").fetchall()
    latest: dict[tuple[str, str, str], list[float]] = {}
    for kind, model, what, seconds in rows:
        values = latest.setdefault((kind, model, what), [])
        if len(values) < 20:
            values.append(seconds)
    return {k: sum(v) / len(v) for k, v in latest.items()}


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, check_same_thread=False)
    connection.executescript(_SCHEMA)
    return connection
