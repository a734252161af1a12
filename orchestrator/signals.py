"""Ctrl-C and SIGTERM: of a run, once to stop scheduling and let running stages end, twice to end now; of other commands, the end."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

STOPPING = "stopping: running stages end and are kept; once more to end now"
ENDING = "ending now; `bitgrid resume` continues"


class StopRequest:
    """How often the user asked to stop. Setting and reading need no lock: it only ever grows."""

    def __init__(self) -> None:
        self._count = 0

    @property
    def requested(self) -> bool:
        return self._count > 0

    @property
    def killed(self) -> bool:
        return self._count > 1

    def request(self) -> None:
        """Stop, or, called again, end now."""
        self._count += 1


@contextmanager
def stop_on_signals(console: Console) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into `StopRequest.request` inside the block; a third one raises KeyboardInterrupt.

    Enter it after Ray was started or joined: `ray.init` puts its own SIGTERM handler in place. Signals reach only the main
    thread; in another one nothing is installed, and the request is never made.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.killed:
            raise KeyboardInterrupt
        stop.request()
        # Not printed from here: the signal may have come in the middle of a print.
        threading.Thread(target=console.print, args=(ENDING if stop.killed else STOPPING,), daemon=True).start()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def stopping_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does, so that no process it started stays behind."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # One that is ignored on purpose (nohup) stays so.
    caught = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, stop) for s in caught}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def run_child(command: Sequence[str], folder: Path) -> int:
    """Exit code of a command that, on SIGTERM, removes what it has begun. Ctrl-C ends it by that: of itself, it would be a traceback."""
    with stopping_signals():
        child = subprocess.Popen(command, cwd=folder, start_new_session=True)
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
