"""A yaml of one's own that says of the code what is not so is refused while planning, not by a worker after calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cell import Option
from orchestrator.errors import ConfigError
from orchestrator.facts import check_facts
from orchestrator.grid import compose_grid
from orchestrator.plan import build_plan
from orchestrator.run import sources

ROUNDING = "rounding: {{kind: gptq, version: {version}, needs: {needs}, reads: [], uses_seed: {seed}, supports: {supports}}}\n"
COPY = {"version": "2", "needs": "[hessian]", "seed": "false", "supports": "{numbers: [any]}"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"version": "1"}, r"^method=mine: method\.rounding\.version is 1, but 2 in conf/method/gptq\.yaml: it is a fact about the code"),
        ({"needs": "[absmax]"}, r"needs is \['absmax'\], but \['hessian'\]"),
        ({"seed": "true"}, "uses_seed is True, but False"),
        ({"supports": "{bits: [9]}"}, r"supports is \{'bits': \[9\]\}, but \{'numbers'"),
    ],
)
def test_a_copy_of_a_method_that_fell_behind_is_refused(change: dict[str, str], told: str | None, tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(ROUNDING.format(**{**COPY, **change}))
    grid = compose_grid(["method=mine"], config_dir=str(tmp_path), multirun=False)
    planned = lambda: build_plan(grid, sources(grid.settings, tmp_path, preview=True))  # noqa: E731
    if told is None:
        assert planned().cells
        return
    with pytest.raises(ConfigError, match=told):
        planned()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("kind: perplexty", "unknown task.kind 'perplexty'; nearest: perplexity"),
        ("version: 9", r"task=mine: task\.version is 9, but 1 in conf/task/"),
        ("metrics: {accuracy: {higher_is_better: true}}", "unknown metric 'accuracy'"),
        ("metrics: {ppl: {higher_is_better: true}}", r"task\.metrics\.ppl is \{'higher_is_better': True\}, but .*False"),
    ],
)
def test_a_task_that_no_worker_has_is_refused(change: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(f"defaults: [self_perplexity, _self_]\n{change}\n")
    (cell,) = compose_grid(["task=mine"], config_dir=str(tmp_path), multirun=False).cells
    with pytest.raises(ConfigError, match=told):
        check_facts(cell.task)


def test_every_shipped_option_says_what_the_file_of_its_kind_says() -> None:
    for axis in ("method", "task"):
        options: list[Option] = [getattr(c, axis) for c in compose_grid([f"{axis}=glob(*)"], multirun=True).cells]
        for option in options:
            check_facts(option)
