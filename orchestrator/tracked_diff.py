"""What MLflow holds of a run against what it should hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.mlflow_names import TAG_LENGTH
from orchestrator.tracked_files import ArtifactFile
from orchestrator.tracked_metrics import Point
from orchestrator.tracked_runs import SWEEP_RUN, RunDescription

CONTENT, FILES, REPLACED = "bitgrid.content", "bitgrid.artifacts", "bitgrid.replaced"
PARENT = "mlflow.parentRunId"
OWN_METRICS = ("eval/", "delta/", "size/", "time/", "err/", "mem/", "layer/", "perf/", "progress/")
PROGRESS = "progress/"
OWN_PARAMS = ("model.", "quant.", "calibration.", "replicate")


@dataclass(frozen=True)
class LoggedRun:
    """A run as MLflow's search tells it."""

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    latest: tuple[Point, ...] = ()
    """The last point of each metric."""

    @property
    def key(self) -> str:
        return self.tags.get("bitgrid.variant_key", SWEEP_RUN)

    @property
    def files(self) -> dict[str, str]:
        """Artifacts written before: path ▸ digest, as `file_tag` wrote them."""
        try:
            return dict(json.loads(self.tags.get(FILES, "{}")))
        except ValueError:
            return {}


def same_content(run: LoggedRun, wanted: RunDescription) -> bool:
    return run.tags.get(CONTENT) == wanted.content


def amendable(run: LoggedRun, wanted: RunDescription) -> bool:
    """Whether adding to the run makes it what is wanted: MLflow cannot change a param or forget a point.

    A param or metric that is not bitgrid's was added by someone else and stays. While a sweep is resumed the progress it made before is
    not told, and not judged.
    """
    if any(k.startswith(OWN_PARAMS) and wanted.params.get(k) != v for k, v in run.params.items()):
        return False
    points: dict[str, list[Point]] = {}
    for p in wanted.metrics:
        points.setdefault(p.name, []).append(p)
    judged = [p for p in run.latest if p.name.startswith(OWN_METRICS) and not (wanted.status == "RUNNING" and p.name.startswith(PROGRESS))]
    return all(any(_same(p, q) for q in points.get(p.name, ())) for p in judged)


def stale_tags(run: LoggedRun, wanted: RunDescription) -> list[str]:
    """Tags of an earlier state (an error since repaired)."""
    kept = {*wanted.tags, CONTENT, FILES}
    return [t for t in run.tags if (t.startswith("bitgrid.") or t == "mlflow.note.content") and t not in kept]


def new_files(known: Mapping[str, str], wanted: RunDescription) -> list[ArtifactFile]:
    return [a for a in wanted.artifacts if known.get(a.path) != a.sha256[:16]]


def file_tag(wanted: RunDescription) -> str:
    text = json.dumps({a.path: a.sha256[:16] for a in wanted.artifacts})
    # Too many for a tag: the artifacts are then written again when anything of the run changes.
    return text if len(text) <= TAG_LENGTH else "{}"


def _same(logged: Point, wanted: Point) -> bool:
    if (logged.timestamp_ms, logged.step) != (wanted.timestamp_ms, wanted.step):
        return False
    # Databases keep NaN and infinity in their own ways.
    return not math.isfinite(wanted.value) or math.isclose(logged.value, wanted.value, rel_tol=1e-12)
