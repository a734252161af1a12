"""Keeps MLflow beside a sweep: one writer, a thread while stages run, a last write at the end.

Nothing here holds or fails a sweep. What was written is remembered in the ledger by digest: where MLflow still holds the runs of a
finished sweep, it is not even opened again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.fingerprint import digest
from orchestrator.ledger import Ledger
from orchestrator.results import SweepResult
from orchestrator.stage import Stage, Status
from orchestrator.track import Typed, open_tracker
from orchestrator.tracked_runs import Phase, content_digest, run_keys
from orchestrator.tracking import SyncReport, TrackingSettings
from workers.request import Failure

INTERVAL_S = 10.0


class Projection:
    """One sweep's tracking. `load` reads the sweep's present state from the store."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        project_dir: Path,
        ledger: Ledger,
        load: Callable[[], SweepResult],
        typed: Typed = "bitgrid {}".format,
    ) -> None:
        self._tracker = open_tracker(settings, project_dir, typed)
        self._place = TrackingSettings.of(settings, project_dir)
        self._ledger = ledger
        self._load = load
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._notes: list[str] = []
        """What syncs beside the running sweep found changed by hand."""

    def start(self) -> None:
        """Write while the sweep runs."""
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._thread.start()

    def status(self, stage: Stage, status: Status, blocked_by: str | None) -> None:
        if status.finished:
            self._changed.set()

    def failed_attempt(self, stage: Stage, failure: Failure, attempt: int, will_retry: bool) -> None:
        return None

    def _loop(self) -> None:
        # A tracker that is not ready pauses itself for a minute; what it missed then, `finish` tells.
        self._tracker.prepare()
        while not self._stop.wait(INTERVAL_S):
            if self._changed.is_set():
                self._changed.clear()
                self._notes += self._tracker.sync(self._load(), Phase.RUNNING, budget_s=INTERVAL_S).notes

    @property
    def _written(self) -> str:
        """Name of the place in the ledger."""
        return digest([self._place.kind, self._place.uri, self._place.experiment])

    def _is_there(self, result: SweepResult) -> bool:
        """Whether what was written still is: a database may have been deleted and made anew by another sweep, a run deleted by hand."""
        found = self._tracker.runs_of(result.key)
        return found is None or run_keys(result) <= found

    def finish(self, result: SweepResult, attachments: Mapping[str, Path], reconcile: bool = False) -> SyncReport:
        """The last write. Does nothing when this very state was written before and is still there, unless `reconcile`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        state = digest([content_digest(result), self._place.log_artifacts])
        if not reconcile and self._ledger.flushed(result.key, self._written) == state and self._is_there(result):
            report = SyncReport(unchanged=len(run_keys(result)))
        else:
            write = self._tracker.reconcile if reconcile else self._tracker.sync
            report = write(result, Phase.ENDED, attachments)
            if report.complete:
                self._ledger.set_flushed(result.key, self._written, state)
        self._tracker.close()
        return replace(report, notes=tuple(dict.fromkeys((*self._notes, *report.notes))))
