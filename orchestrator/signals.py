"""Ctrl-C and SIGTERM: once to stop scheduling and let running stages end, twice to end now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
