"""Numbers on a device with which blocks of a kernel count how many of them have arrived: every call finds zeros, and leaves zeros."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

COUNTERS = 1 << 18
"""That a device has. Calls take the next ones in turn, so that calls at the same time have their own. A graph keeps those that it was
captured with: it is not to be replayed beside calls in other streams."""
_lock = Lock()
_made: dict[torch.device, Counters] = {}


class Counters:
    """Those of a device."""

    def __init__(self, device: torch.device) -> None:
        self._all = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        if self._all.is_cuda:
            torch.cuda.current_stream(self._all.device).synchronize()  # other streams use them, too
        self._next = 0

    def take(self, count: int) -> Tensor:
        """int32 `[count]`, at an address that is a multiple of 16."""
        with _lock:
            start = self._next if self._next + count <= COUNTERS else 0
            self._next = start + -(-count // 4) * 4
        return self._all[start : start + count]


def counters(device: torch.device) -> Counters:
    """One for all threads; to be asked for before a graph is captured, whose own memory they must not be."""
    with _lock:
        # One for all threads: memory of another would be given back while a kernel counts in it.
        if device not in _made:
            _made[device] = Counters(device)
        return _made[device]
