"""Tracking as the rest of bitgrid sees it: settings, the `Tracker` protocol, what a sync reports, and the tracker that does nothing.

Tracking is a projection of the store and never a reason for a sweep to fail or to wait: trouble is returned as text, the
sweep goes on, and `bitgrid reconcile` catches up later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import ConfigError, unknown_name
from orchestrator.results import SweepResult
from orchestrator.tracked_runs import Phase

KINDS = ("none", "mlflow", "mlflow_server")


@dataclass(frozen=True)
class TrackingSettings:
    """conf/tracking/*.yaml."""

    kind: str = "mlflow"
    """none; mlflow (a database of its own in the project folder); mlflow_server (over HTTP)."""
    uri: str | None = None
    """Null: sqlite:///<project>/mlflow.db, or MLFLOW_TRACKING_URI for a server."""
    artifact_location: str | None = None
    """Null: <project>/mlartifacts, or what the server decides."""
    experiment: str = "bitgrid"
    timeout_s: float = 5
    """For one answer of a server; after the first that does not come, tracking pauses."""
    log_artifacts: bool = True

    @property
    def experiments(self) -> tuple[str, ...]:
        """Names to take, the next where one is in MLflow's trash and cannot be restored."""
        return (self.experiment, *(f"{self.experiment}-{n}" for n in range(2, 10)))

    @staticmethod
    def of(settings: Mapping[str, Any], project_dir: Path) -> TrackingSettings:
        """Fill in the defaults that depend on the project folder. Raises ConfigError, also for an address that holds credentials."""
        known = [f.name for f in fields(TrackingSettings)]
        for name in settings:
            if name not in known:
                raise ConfigError(unknown_name("key of tracking", str(name), known))
        given = TrackingSettings(**settings)
        if given.kind not in KINDS:
            raise ConfigError(unknown_name("tracking.kind", str(given.kind), KINDS))
        if not isinstance(given.experiment, str) or not given.experiment.strip():
            raise ConfigError(f"tracking.experiment={given.experiment!r}; give the experiment's name, such as bitgrid")
        if isinstance(given.timeout_s, bool) or not isinstance(given.timeout_s, (int, float)) or not given.timeout_s > 0:
            raise ConfigError(f"tracking.timeout_s={given.timeout_s!r}; give a positive number of seconds")
        uri, artifacts = given.uri, given.artifact_location
        if given.kind == "mlflow_server":
            uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        _refuse_credentials("tracking.uri (or MLFLOW_TRACKING_URI)", uri)
        _refuse_credentials("tracking.artifact_location", artifacts)
        if given.kind == "mlflow":
            if not uri and re.search(r"\?|%[0-9A-Fa-f]{2}", str(project_dir.resolve())):
                raise ConfigError(
                    f"MLflow cannot keep its database in {project_dir.resolve()}: in an address ? and % with two digits mean other "
                    "things, and it would be elsewhere; run in another folder, or set tracking.uri=, or tracking=none"
                )
            uri = uri or f"sqlite:///{project_dir.resolve() / 'mlflow.db'}"
            artifacts = artifacts or (project_dir.resolve() / "mlartifacts").as_uri()
        elif given.kind == "mlflow_server" and (not uri or not uri.startswith(("http://", "https://"))):
            raise ConfigError(
                f"tracking=mlflow_server has tracking.uri={uri!r}; give the address of the server, such as "
                "tracking.uri=http://mlflow.example:5000, or set MLFLOW_TRACKING_URI"
            )
        return TrackingSettings(given.kind, uri, artifacts, given.experiment, float(given.timeout_s), bool(given.log_artifacts))


def _refuse_credentials(name: str, address: str | None) -> None:
    """Settings go into the store, MLflow and the report, and messages name the address; this one does not."""
    found = re.match(r"(?P<scheme>[\w+.-]+)://(?P<user>[^/?#]*)@", address or "")
    if found is not None and (found["scheme"] in ("http", "https") or ":" in found["user"]):
        raise ConfigError(
            f"{name} holds a user name or password, which would be written into the store and the report; take it out of the address: "
            "a server's go into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a database's where its client looks for them "
            "(for PostgreSQL PGPASSWORD or ~/.pgpass)"
        )


@dataclass(frozen=True)
class SyncReport:
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    left: int = 0
    """Runs that were not reached within the budget; the next sync takes them up."""
    failed: str | None = None
    """Why not everything was written, for people; names the command that catches up."""
    notes: tuple[str, ...] = ()
    """What was found changed by hand, and what was done about it."""
    run_ids: Mapping[str, str] = field(default_factory=dict)
    """Variant key (or `SWEEP_RUN`) ▸ MLflow run id. A hint: runs are always found by their tags."""

    @property
    def complete(self) -> bool:
        return self.failed is None and self.left == 0


@dataclass
class SyncTally:
    """A sync in progress."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    left: int = 0
    refused: list[str] = field(default_factory=list)
    """Runs that MLflow refused, with its reason."""
    notes: list[str] = field(default_factory=list)
    run_ids: dict[str, str] = field(default_factory=dict)

    def report(self, failed: str | None) -> SyncReport:
        return SyncReport(self.created, self.updated, self.unchanged, self.left, failed, tuple(self.notes), dict(self.run_ids))


class Tracker(Protocol):
    def prepare(self) -> str | None:
        """Create and migrate the database, or reach the server. The reason, where that fails; tracking then pauses."""

    def sync(
        self,
        result: SweepResult,
        phase: Phase,
        attachments: Mapping[str, Path] | None = None,
        budget_s: float | None = None,
    ) -> SyncReport:
        """Make MLflow's runs equal to the result; only what changed is written. Never raises for MLflow's sake.

        Args:
            attachments: files for the sweep's run, artifact path ▸ file: report.html, plan.json.
            budget_s: start no further run after so many seconds.
        """

    def reconcile(self, result: SweepResult, phase: Phase, attachments: Mapping[str, Path] | None = None) -> SyncReport:
        """`sync` that trusts no earlier one: every run is compared and its artifacts are written again."""

    def runs_of(self, sweep: str) -> set[str] | None:
        """Keys of the runs that are there of a sweep, written in any earlier sync; None where that cannot be asked. Writes nothing."""

    def close(self) -> None: ...


class NoTracker:
    """tracking=none."""

    def prepare(self) -> str | None:
        return None

    def sync(
        self, result: SweepResult, phase: Phase, attachments: Mapping[str, Path] | None = None, budget_s: float | None = None
    ) -> SyncReport:
        return SyncReport()

    def reconcile(self, result: SweepResult, phase: Phase, attachments: Mapping[str, Path] | None = None) -> SyncReport:
        return SyncReport()

    def runs_of(self, sweep: str) -> set[str] | None:
        return None

    def close(self) -> None:
        return None
