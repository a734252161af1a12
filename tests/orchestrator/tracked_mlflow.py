"""Reading back what MLflow holds of a sweep."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from orchestrator.track import MlflowTracker
from orchestrator.tracking import TrackingSettings
from tests.orchestrator.tracked_sweep import fixed_delta

INTERNAL = ("mlflow.parentRunId", "mlflow.user")


def tracker_of(project: Path, **settings: Any) -> MlflowTracker:
    return MlflowTracker(TrackingSettings.of({"kind": "mlflow", **settings}, project), fixed_delta)


def client_of(project: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{project / 'mlflow.db'}")


def runs_of(client: Any, view: int = 1) -> list[Any]:
    experiments = [e.experiment_id for e in client.search_experiments(view_type=3)]
    return list(client.search_runs(experiments, run_view_type=view, max_results=1000))


def dump(client: Any, artifacts: Path | None = None) -> dict[str, Any]:
    """Everything that "the same runs" means, by the parent's and the run's own name."""
    runs = runs_of(client)
    names = {r.info.run_id: r.info.run_name for r in runs}
    out = {}
    for run in runs:
        history = {
            key: sorted((m.value, m.step, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics
        }
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        files = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}
        parent = names.get(run.data.tags.get("mlflow.parentRunId", ""), "")
        out[f"{parent}/{run.info.run_name}"] = {
            "status": run.info.status,
            "start": run.info.start_time,
            "end": run.info.end_time,
            "params": run.data.params,
            "metrics": history,
            "tags": {k: v for k, v in run.data.tags.items() if k not in INTERNAL},
            "files": files,
        }
    assert len(out) == len(runs)
    return out
