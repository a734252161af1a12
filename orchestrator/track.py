"""MLflow as a projection of the store: the only file that imports mlflow, and only once something is to be written.

One writer. A run is found by its tags `bitgrid.sweep_key` and `bitgrid.variant_key` in every sync, so that neither a lost
ledger nor a lost answer makes a second one. Its content digest, a tag set last, tells whether it must be written:
a sync that was cut off is repeated, a finished one is not.

MLflow cannot change a param, forget a metric or move a start time. Where a run holds such a value that the store no longer
tells (an artifact was recomputed), the run goes to MLflow's trash and is made anew.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.dashboard_view import view_tag
from orchestrator.mlflow_setup import (
    OUT_OF_DATE,
    check_sqlite,
    client_environment,
    made_whole_or_empty,
    one_at_a_time,
    sqlite_file,
    sqlite_runs,
    upgrade_sqlite,
)
from orchestrator.results import SweepResult
from orchestrator.stats import paired_delta
from orchestrator.tracked_diff import CONTENT, FILES, PARENT, REPLACED, LoggedRun, amendable, file_tag, new_files, same_content, stale_tags
from orchestrator.tracked_files import ArtifactFile
from orchestrator.tracked_metrics import DeltaOf, Point
from orchestrator.tracked_runs import SWEEP_RUN, Phase, RunDescription, describe_sweep, describe_variant
from orchestrator.tracking import NoTracker, SyncReport, SyncTally, Tracker, TrackingSettings

COOL_DOWN_S = 60.0
"""After a failure, so long nothing is tried."""
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
"""Answers about one run; every other error is about the server."""
ACTIVE, DELETED = 1, 2
"""mlflow.entities.ViewType."""


Typed = Callable[[str], str]
"""A verb and its arguments ▸ how they are typed here."""


def open_tracker(settings: Mapping[str, Any], project_dir: Path, typed: Typed = "bitgrid {}".format) -> Tracker:
    """Tracker for the `tracking` group. Costs nothing: MLflow is imported by the first `prepare` or `sync`. Raises ConfigError."""
    known = TrackingSettings.of(settings, project_dir)
    return NoTracker() if known.kind == "none" else MlflowTracker(known, typed=typed)


class MlflowTracker:
    """`clock` gives monotonic seconds."""

    def __init__(
        self,
        settings: TrackingSettings,
        delta_of: DeltaOf = paired_delta,
        clock: Callable[[], float] = time.monotonic,
        typed: Typed = "bitgrid {}".format,
    ) -> None:
        self._settings = settings
        self._typed = typed
        self._delta_of = delta_of
        self._clock = clock
        self._client: Any = None
        self._pause_until = -math.inf
        self._reason = ""
        self._said: list[str] = []

    def prepare(self) -> str | None:
        try:
            with client_environment(self._settings.timeout_s):
                self._open()
        except Exception as e:  # whatever MLflow raises, a sweep goes on without it
            return self._trip(e)
        return None

    def sync(
        self,
        result: SweepResult,
        phase: Phase,
        attachments: Mapping[str, Path] | None = None,
        budget_s: float | None = None,
    ) -> SyncReport:
        return self._sync(result, phase, attachments, budget_s, same_content)

    def reconcile(self, result: SweepResult, phase: Phase, attachments: Mapping[str, Path] | None = None) -> SyncReport:
        self._pause_until = -math.inf
        return self._sync(result, phase, attachments, None, _trust_none)

    def runs_of(self, sweep: str) -> set[str] | None:
        file = sqlite_file(self._settings.uri or "")
        if file is not None:
            return {key or SWEEP_RUN for key in sqlite_runs(file, self._settings.experiments, sweep, self._settings.timeout_s)}
        if self._clock() < self._pause_until:
            return None
        try:
            with client_environment(self._settings.timeout_s):
                self._open()
                for name in self._settings.experiments:
                    found = self._client.get_experiment_by_name(name)
                    if found is None:
                        break
                    if found.lifecycle_stage == "active":
                        return {run.key for run in _search(self._client, found.experiment_id, sweep, ACTIVE)}
        except Exception as e:  # as above
            self._trip(e)
            return None
        return set()

    def close(self) -> None:
        store = getattr(getattr(self._client, "_tracking_client", None), "store", None)
        if store is not None and hasattr(store, "_dispose_engine"):
            store._dispose_engine()
        self._client = None

    def _sync(
        self,
        result: SweepResult,
        phase: Phase,
        attachments: Mapping[str, Path] | None,
        budget_s: float | None,
        trust_earlier: Callable[[LoggedRun, RunDescription], bool],
    ) -> SyncReport:
        tally = SyncTally()
        start = self._clock()
        if start < self._pause_until:
            return tally.report(self._advice(result, self._reason))
        try:
            with client_environment(self._settings.timeout_s):
                self._open()
                tally.notes += self._said
                self._said = []
                experiment = self._experiment(result, tally)
                pass_ = _Pass(self._client, experiment, result.key, self._settings, trust_earlier, tally)
                pass_.find()
                parent = pass_.write(describe_sweep(result, phase, attachments), None)
                for variant in result.variants:
                    if budget_s is not None and self._clock() - start > budget_s:
                        tally.left += 1
                        continue
                    run = describe_variant(result, variant, phase, self._delta_of)
                    if run is not None:
                        pass_.write(run, parent)
        except Exception as e:  # as above
            return tally.report(self._advice(result, self._trip(e)))
        return tally.report(self._advice(result, "; ".join(tally.refused)) if tally.refused else None)

    def _open(self) -> None:
        if self._client is not None:
            return
        uri = self._settings.uri or ""
        file = sqlite_file(uri)
        if file is None:
            self._client = self._connected(uri, None)
            return
        check_sqlite(file, self._settings.timeout_s)
        with one_at_a_time(file), made_whole_or_empty(file):
            self._client = self._connected(uri, file)

    def _connected(self, uri: str, file: Path | None) -> Any:
        """A client whose database, where it is the file, has the tables of this MLflow."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # Prints a traceback of whatever a database answers, which the sync tells in a line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        try:
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        except MlflowException as e:
            if file is None or OUT_OF_DATE not in str(e):
                raise
            self._said.append(upgrade_sqlite(file))
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        return client

    def _trip(self, error: Exception) -> str:
        self._pause_until = self._clock() + COOL_DOWN_S
        self._client = None
        text = " ".join(str(error).split())
        self._reason = f"{self._settings.uri}: {type(error).__name__}: {text[:300]}"
        return self._reason

    def _advice(self, result: SweepResult, reason: str) -> str:
        later = self._typed(f"reconcile {result.key[:12]}")
        return f"MLflow was not brought up to date ({reason}); nothing is lost: run `{later}` later"

    def _experiment(self, result: SweepResult, tally: SyncTally) -> str:
        """Id of the active experiment: the deleted one is taken out of the trash, or where that fails a numbered one is made."""
        from mlflow.exceptions import MlflowException

        for name in self._settings.experiments:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                found = self._new_experiment(name, result)
            if found.lifecycle_stage == "active":
                return self._with_view(found, result)
            try:
                self._client.restore_experiment(found.experiment_id)
            except MlflowException as e:
                tally.notes.append(f"experiment {name!r} is in MLflow's trash and cannot be restored ({e}); the next name is used")
                continue
            tally.notes.append(f"experiment {name!r} was in MLflow's trash and was restored")
            return self._with_view(found, result)
        first, *_, last = self._settings.experiments
        raise RuntimeError(f"experiments {first} to {last} are all deleted; set tracking.experiment to another name")

    def _new_experiment(self, name: str, result: SweepResult) -> Any:
        # Without a kind MLflow guesses one, and may open its view of traces in place of the table of runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        task = next(iter(result.tasks.values()), None)
        if task is not None:
            tags["mlflow.experiment.primaryMetric.name"] = f"eval/{task.name}/{task.primary}"
            tags["mlflow.experiment.primaryMetric.greaterIsBetter"] = str(task.higher_is_better.get(task.primary, False))
        return self._client.get_experiment(self._client.create_experiment(name, self._settings.artifact_location, tags))

    def _with_view(self, experiment: Any, result: SweepResult) -> str:
        key, value = view_tag(result)
        if experiment.tags.get(key) != value:
            self._client.set_experiment_tag(experiment.experiment_id, key, value)
        return str(experiment.experiment_id)


@dataclass
class _Pass:
    """One sync: the runs found at its start, and the writing of each."""

    client: Any
    experiment: str
    sweep: str
    settings: TrackingSettings
    trust_earlier: Callable[[LoggedRun, RunDescription], bool]
    tally: SyncTally
    found: dict[str, LoggedRun] = field(default_factory=dict)
    deleted: set[str] | None = None
    """Keys of runs that someone deleted by hand; looked up when a run is to be created."""

    def find(self) -> None:
        """Active runs of the sweep by key. A second one with the same key (an answer that got lost) goes to the trash."""
        runs = sorted(_search(self.client, self.experiment, self.sweep, ACTIVE), key=lambda r: (CONTENT not in r.tags, r.run_id))
        for run in runs:
            if REPLACED in run.tags:
                self.client.delete_run(run.run_id)  # it came back with a restored experiment
            elif run.key in self.found:
                self._discard(run)
                self.tally.notes.append(f"{run.name!r} had two runs; one was moved to MLflow's trash")
            else:
                self.found[run.key] = run

    def write(self, wanted: RunDescription, parent: str | None) -> str | None:
        """Id of the run that now is as wanted; None where MLflow refused it."""
        from mlflow.exceptions import MlflowException

        if not self.settings.log_artifacts:
            wanted = replace(wanted, artifacts=())
        run = self.found.get(wanted.key)
        try:
            if run is not None and self.trust_earlier(run, wanted) and run.tags.get(PARENT) == parent:
                self.tally.unchanged += 1
            else:
                run = self._write(run, wanted, parent)
        except MlflowException as e:
            if e.error_code not in REFUSED or wanted.key == SWEEP_RUN:
                raise
            self.tally.refused.append(f"{wanted.name}: {' '.join(str(e).split())[:200]}")
            return None
        self.tally.run_ids[wanted.key] = run.run_id
        return run.run_id

    def _write(self, run: LoggedRun | None, wanted: RunDescription, parent: str | None) -> LoggedRun:
        if run is not None and not amendable(run, wanted):
            self._discard(run)
            self.tally.notes.append(f"{wanted.name!r} held values that the store no longer tells; its run was made again")
            run = None
        elif run is None and wanted.key in self._deleted_by_hand():
            self.tally.notes.append(f"the run of {wanted.name!r} was deleted by hand; it was made again")
        tags = {**wanted.tags, **({PARENT: parent} if parent else {})}
        if run is None:
            run = _logged(self.client.create_run(self.experiment, wanted.start_ms, tags, wanted.name))
            self.tally.created += 1
        else:
            self.tally.updated += 1
        self._fill(run, wanted, tags)
        return run

    def _fill(self, run: LoggedRun, wanted: RunDescription, tags: Mapping[str, str]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(p.name, p.value, p.timestamp_ms, p.step) for p in wanted.metrics]
        params = [Param(k, v) for k, v in wanted.params.items() if k not in run.params]
        self.client.log_batch(run.run_id, metrics, params, [RunTag(k, v) for k, v in tags.items() if run.tags.get(k) != v])
        for tag in stale_tags(run, wanted):
            self.client.delete_tag(run.run_id, tag)
        if run.name != wanted.name:
            self.client.update_run(run.run_id, name=wanted.name)
        self._upload(run.run_id, new_files(run.files if self.trust_earlier is same_content else {}, wanted))
        if wanted.end_ms is not None:
            self.client.set_terminated(run.run_id, wanted.status, wanted.end_ms)
        elif run.status != wanted.status:
            self.client.update_run(run.run_id, status=wanted.status)
        # Last: a run without them, or with older ones, is written again.
        self.client.log_batch(run.run_id, tags=[RunTag(FILES, file_tag(wanted)), RunTag(CONTENT, wanted.content)])

    def _upload(self, run_id: str, files: list[ArtifactFile]) -> None:
        if not files:
            return
        with tempfile.TemporaryDirectory(prefix="bitgrid-track-") as name:
            for a in files:
                target = Path(name) / a.path
                target.parent.mkdir(parents=True, exist_ok=True)
                if a.source is None:
                    target.write_bytes(a.content)
                else:
                    target.symlink_to(a.source.resolve())
            self.client.log_artifacts(run_id, name)

    def _deleted_by_hand(self) -> set[str]:
        if self.deleted is None:
            runs = _search(self.client, self.experiment, self.sweep, DELETED)
            self.deleted = {r.key for r in runs if REPLACED not in r.tags}
        return self.deleted

    def _discard(self, run: LoggedRun) -> None:
        self.client.set_tag(run.run_id, REPLACED, "true")
        self.client.delete_run(run.run_id)


def _search(client: Any, experiment: str, sweep: str, view: int) -> Iterator[LoggedRun]:
    query, token = f"tags.`bitgrid.sweep_key` = '{sweep}'", None
    while True:
        page = client.search_runs([experiment], query, view, 1000, page_token=token)
        yield from map(_logged, page)
        token = page.token
        if not token:
            return


def _logged(run: Any) -> LoggedRun:
    latest = tuple(Point(m.key, m.value, m.timestamp, m.step) for m in run.data.to_proto().metrics)
    return LoggedRun(run.info.run_id, run.info.run_name, run.info.status, run.data.params, run.data.tags, latest)


def _trust_none(run: LoggedRun, wanted: RunDescription) -> bool:
    return False
