"""The peer of bench/launcher.py: a Hydra application under the official Ray launcher, one job per cell, the same stage functions.

A job computes what its table row needs, baseline included, in a store of its own: jobs of that launcher share nothing. Runs in the
environment of requirements/bench-peer.txt.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def job(config: DictConfig) -> float:
    from orchestrator.grid import compose_grid
    from orchestrator.hooks import StoreHooks
    from orchestrator.ledger import Ledger
    from orchestrator.plan import build_plan
    from orchestrator.retries import Adjustment
    from orchestrator.run import sources
    from orchestrator.stage import Stage
    from orchestrator.store import Store
    from workers.request import Hints, Outcome
    from workers.run_stage import run_request

    overrides = list(HydraConfig.get().overrides.task)
    grid = compose_grid(overrides, multirun=False)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store").open()
        plan = build_plan(grid, sources(grid.settings, store.root))
        with Ledger(store.root / "ledger.sqlite") as ledger:
            hooks = StoreHooks(store, ledger, plan, Hints(threads=1), ())
            for stage in plan.stages.values():

                def commit(outcome: Outcome, stage: Stage = stage) -> None:
                    if outcome.failure is not None:
                        raise RuntimeError(f"{stage.label}: {outcome.failure.message}\n{outcome.failure.log_tail}")
                    hooks.commit(stage, outcome)

                run_request(hooks.request("job", [stage], {stage.key: 1}, Adjustment()), commit)
        cell = plan.cells[0]
        summary = store.record(plan.stages[cell.evaluate].kind, cell.evaluate)["summary"]
    score = float(summary["scores"][summary["primary"]])
    with Path(os.environ["BITGRID_PEER_SCORES"]).open("a") as f:
        f.write(json.dumps({"cell": cell.cell.names(), "score": score}) + "\n")
    return score


if __name__ == "__main__":
    job()
