"""What a command prints, on a stream that may go away: a reader that ends (`| head`), a full disk, a terminal that was closed.

None of them ends a sweep. What cannot be written is dropped, and whoever printed it goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

UNICODE = ("utf-8", "utf8")


class Output:
    """A text stream that raises no OSError: after the first one it drops what it is given."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """Why it drops."""

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as e:
                self._drop(e)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as e:
                self._drop(e)

    def _drop(self, error: OSError) -> None:
        self.error = error
        # What the stream still holds goes nowhere when the process ends, in place of an error that nobody could handle.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[Output | None]:
    """Standard output and error as such streams; the first of them, None where the process has no standard output.

    Characters that their encoding lacks are replaced: a table has some that no Latin-1 terminal shows.
    """
    before = sys.stdout, sys.stderr
    made = [None if s is None else Output(s) for s in before]
    for stream in before:
        # Python escapes for itself in the locales C and POSIX, but not for a table's characters where those are ASCII.
        lacks = ("strict",) if getattr(stream, "encoding", "").lower() in UNICODE else ("strict", "surrogateescape")
        if hasattr(stream, "reconfigure") and stream.errors in lacks:
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (cast(TextIO, m) for m in made)
    try:
        yield made[0]
    finally:
        for output in made:
            if output is not None:
                output.flush()
        sys.stdout, sys.stderr = before


def lost(output: Output | None) -> str | None:
    """Why standard output lacks something that was printed; None where it does not, or its reader wanted no more."""
    if output is not None:
        output.flush()
    return None if output is None or output.error is None or isinstance(output.error, BrokenPipeError) else str(output.error)
