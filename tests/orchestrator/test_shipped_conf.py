"""The shipped conf/: every option composes, the fast way equals Hydra's own, the named sweeps are what they say."""

from __future__ import annotations

import random
from collections.abc import Iterator

import hydra
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.cell import AXES
from orchestrator.config import CHOICES
from orchestrator.grid import compose_grid, compose_with
from orchestrator.hydra_bridge import Composer

COMPOSER = Composer.at()
OPTIONS = {axis: COMPOSER.options(axis) for axis in AXES}
NUMBERS = {
    "gptq": {"method.rounding.params.damp": "0.05", "method.rounding.params.block_size": "64", "method.propagation": "quantized"},
    "awq": {"method.transforms.awq.params.scale_grid": "7", "method.transforms.awq.params.clip_search": "false"},
    "rtn": {"method.rounding.params.mse": "true"},
}


@pytest.fixture(scope="module", autouse=True)
def hydra_on_conf() -> Iterator[None]:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        yield


def test_every_option_composes_alone() -> None:
    for axis in AXES:
        grid = compose_with(COMPOSER, [f"{axis}=glob(*)"], multirun=True)
        assert [getattr(c, axis).name for c in grid.cells] == OPTIONS[axis]
        assert grid.notes == ()


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_random_cells_equal_hydras_own_compose(seed: int) -> None:
    chosen = random.Random(seed)
    lines = [f"{axis}={chosen.choice(options)}" for axis, options in OPTIONS.items()]
    method = lines[AXES.index("method")].partition("=")[2]
    lines += [f"{k}={v}" for k, v in NUMBERS.get(method, {}).items() if chosen.random() < 0.5]
    lines += [x for x in ("replicate.seed=7", "task.params.limit=3", "calibration.samples=5", "data_dir=/d") if chosen.random() < 0.5]
    grid = compose_with(COMPOSER, lines, multirun=False)
    expected = OmegaConf.to_container(hydra.compose("config", lines), resolve=True)
    assert grid.notes == ()
    assert {**grid.settings, **{axis: getattr(grid.cells[0], axis).values for axis in AXES}} == expected


def test_the_demo_is_three_methods_by_five_schemes_by_two_tasks() -> None:
    grid = compose_grid(["sweep=demo"], multirun=True)
    assert len(grid.cells) == 30
    assert {c.method.name for c in grid.cells} == {"rtn", "gptq", "awq"}
    assert {c.task.name for c in grid.cells} == {"self_perplexity", "self_divergence"}
    assert len({c.scheme.name for c in grid.cells}) == 5
    assert grid.settings["sweep"]["name"] == "demo"


def test_the_example_sweep_shows_every_rule_at_work() -> None:
    grid = compose_grid(["sweep=examples"], multirun=True)
    rows = [(c.method.name, c.scheme.name) for c in grid.cells]
    assert ("rtn", "w2a16_channel") not in rows
    assert {scheme for method, scheme in rows if method == "smoothquant"} == {"w8a8"}
    assert {c.calibration.name for c in grid.cells} == {
        "self_text[samples=32,sequence_length=64]",
        "self_text[samples=16,sequence_length=128]",
    }
    assert rows.count(("gptq[rounding.params.damp=0.1]", "w2a16_channel")) == 2
    assert {rule.split(" ")[0] for _, rule in grid.excluded} == {"sweep.exclude", "sweep.only_if"}
    assert grid.notes == ()


def test_words_of_the_configuration_are_those_of_the_code() -> None:
    from quant import grids
    from workers import datasets, specs

    assert set(CHOICES["method", "rounding.params.grid"]) == {*grids.GRIDS, *grids.ALIASES}
    assert set(CHOICES["calibration", "text.split"]) == set(CHOICES["task", "text.split"]) == set(datasets.SPLITS)
    assert set(CHOICES["calibration", "sampling"]) == set(datasets.SAMPLINGS)
    # Left out of the key; every shipped task keeps the key it had.
    for task in compose_grid(["task=glob(*)"], multirun=True).cells:
        assert task.task.values["windows"] == specs.TaskSpec("", 1, specs.TextSpec("")).windows


def test_ten_thousand_cells_share_their_options() -> None:
    grid = compose_grid(["method=gptq", "method.rounding.params.damp=range(0,1,0.01)", "replicate.seed=range(100)"], multirun=True)
    assert len(grid.cells) == 10_000
    assert len({id(option) for cell in grid.cells for option in cell}) == 204
