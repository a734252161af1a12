"""Whether the head of the cluster is there.

Ray ends a process whose head has been away for 60 s, with nothing said but a line of its own, and until then a call that asks for a new
worker does not return. So the driver looks itself, and gives up before: what is done is then reported, and how to go on.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from orchestrator.errors import ClusterError

LOOK_EVERY_S = 1.0
PATIENCE_S = 40.0
"""A head may be started again. Leaving a cluster without one takes up to 10 s, and all must be over before Ray's 60 s."""
OWN_PATIENCE_S = 5.0
"""Of a cluster started here, where nobody starts it again."""
ANSWER_S = 2.0
"""Longest wait for an answer to one look."""


class Head:
    """`address`: host:port. `own`: of a cluster that was started here."""

    def __init__(self, address: str, own: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self._own = own
        self._patience_s = OWN_PATIENCE_S if own else PATIENCE_S
        self._clock = clock
        self._looked = clock()
        self._away_since: float | None = None

    def is_there(self, look: bool = False) -> bool:
        """As of the last look, which is made anew after a while, or at once where `look` says so. Raises ClusterError for one that does not
        come back."""
        now = self._clock()
        if not look and now - self._looked < LOOK_EVERY_S:
            return self._away_since is None
        self._looked = now
        if self._answers():
            self._away_since = None
        elif self._away_since is None:
            self._away_since = now
        elif now - self._away_since > self._patience_s:
            todo = (
                "something ended it, as batch systems do that signal all processes of a job: let them signal bitgrid alone "
                "(docs/running-on-a-cluster.md)"
                if self._own
                else "look at the cluster"
            )
            raise ClusterError(
                f"the head of the Ray cluster at {self.address} has not answered for {self._patience_s:g} s; {todo}, "
                "then run `bitgrid resume`"
            )
        return self._away_since is None

    def _answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
        except OSError:
            return False
        return True
