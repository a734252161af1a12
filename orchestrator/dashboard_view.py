"""A saved view of MLflow's table of runs for each sweep: its variants as rows, axes, bits and headline scores as columns.

Without it the table opens with MLflow's own columns (source, dataset, models) and no score. Saved views are experiment tags that MLflow's
page reads; they are no documented interface, so an MLflow that does not know them merely shows its own columns.
"""

from __future__ import annotations

import json
import urllib.parse

from orchestrator.mlflow_names import metric_name
from orchestrator.results import SweepResult

VIEW_TAG = "mlflow.sharedViewState."


def view_tag(result: SweepResult) -> tuple[str, str]:
    """Key and value of the experiment tag."""
    columns = ["params.`quant.method`", "params.`quant.scheme`", "metrics.`size/bits_stored`"]
    for task in result.tasks.values():
        columns += [f"metrics.`{metric_name(kind, task.name, task.primary)}`" for kind in ("eval", "delta")]
    if len({v.axes.get("model") for v in result.variants}) > 1:
        columns.insert(0, "params.`model.name`")
    name = "attributes.`Run Name`"
    state = {
        "searchFilter": f"tags.`bitgrid.kind` = 'variant' AND tags.`bitgrid.sweep_key` = '{result.key}'",
        "orderByKey": "metrics.`size/bits_stored`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": columns,
        "columnOrder": [name, *columns],
        "columnWidths": {name: 280, **{c: 110 if c.startswith("params.") else 170 for c in columns}},
    }
    view = {"name": f"{result.name} {result.key[:8]}", "createdAt": round(result.created * 1000), "state": json.dumps(state)}
    return VIEW_TAG + view_name(result.key), json.dumps(view)


def view_name(sweep: str) -> str:
    return f"bitgrid-{sweep[:12]}"


def page(experiment: str, sweep: str | None) -> str:
    """What follows the address of the server: the table of runs, with the view of a sweep where one is given."""
    query = {"workflowType": "machine_learning", **({"viewStateShareKey": view_name(sweep)} if sweep else {})}
    return f"#/experiments/{experiment}/runs?{urllib.parse.urlencode(query)}"
