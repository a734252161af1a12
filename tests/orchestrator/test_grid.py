"""Composing a grid: the fast way gives what Hydra gives, cells share options, and what cannot be fast says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.cell import AXES, Cell
from orchestrator.errors import ConfigError
from orchestrator.grid import compose_grid, compose_jobs, compose_with
from orchestrator.hydra_bridge import Composer
from tests.orchestrator.small_conf import composer, write_conf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    return composer(tmp_path_factory.mktemp("conf"))


def names(cell: Cell, *axes: str) -> tuple[str, ...]:
    return tuple(getattr(cell, axis).name for axis in axes)


def hydra_values(composer: Composer, overrides: list[str]) -> dict[str, Any]:
    values = OmegaConf.to_container(composer.compose(overrides), resolve=True)
    assert isinstance(values, dict)
    return values


def test_product_has_hydras_order_with_the_last_key_fastest(small: Composer) -> None:
    grid = compose_with(small, ["method=plain,hess", "scheme=w2,w4"], multirun=True)
    assert [names(c, "method", "scheme") for c in grid.cells] == [("plain", "w2"), ("plain", "w4"), ("hess", "w2"), ("hess", "w4")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("scheme=glob(w4*)", ["w4", "w4g64"]),
        ("scheme=glob(*, exclude=w4*)", ["w2", "w8a8"]),
        ("scheme=choice(w8a8,w2)", ["w8a8", "w2"]),
        ("scheme=sort(w8a8,w2)", ["w2", "w8a8"]),
        ("replicate.seed=range(1,4)", ["r0[seed=1]", "r0[seed=2]", "r0[seed=3]"]),
    ],
)
def test_every_sweep_syntax_of_hydra_enumerates(small: Composer, override: str, expected: list[str]) -> None:
    grid = compose_with(small, [override], multirun=True)
    axis = override.partition("=")[0].partition(".")[0]
    assert [getattr(c, axis).name for c in grid.cells] == expected


def test_cells_share_one_option_object_per_value(small: Composer) -> None:
    grid = compose_with(small, ["method=hess", "method.rounding.params.damp=0.1,0.2", "scheme=w2,w4", "task=ppl,div"], multirun=True)
    assert len(grid.cells) == 8
    assert [len({id(getattr(c, axis)) for c in grid.cells}) for axis in AXES] == [1, 2, 2, 1, 2, 1]


def test_swept_parameters_are_in_the_name_and_fixed_ones_only_in_the_values(small: Composer) -> None:
    overrides = ["method=hess", "method.rounding.params.block_size=64", "method.rounding.params.damp=0.1,0.2"]
    option = compose_with(small, overrides, multirun=True).cells[1].method
    assert option.name == "hess[rounding.params.damp=0.2]"
    assert option.file == "hess"
    assert option.values["rounding"]["params"] == {"damp": 0.2, "block_size": 64, "act_order": True, "outlier_columns": 64}


def test_an_inward_reference_follows_a_swept_value(small: Composer) -> None:
    grid = compose_with(small, ["method=hess", "method.rounding.params.block_size=32,64"], multirun=True)
    assert [c.method.values["rounding"]["params"]["outlier_columns"] for c in grid.cells] == [32, 64]
    assert grid.notes == ()


def test_a_reference_to_a_setting_is_resolved(small: Composer) -> None:
    grid = compose_with(small, ["data_dir=/texts"], multirun=False)
    assert grid.cells[0].task.values["params"]["folder"] == "/texts"
    assert grid.notes == ()


def test_defaults_of_an_option_stay_in_its_package_and_can_be_swept(small: Composer) -> None:
    grid = compose_with(small, ["method=aware", "transform@method.transforms.scale=search,clip"], multirun=True)
    assert [c.method.values["transforms"]["scale"]["kind"] for c in grid.cells] == ["awq", "clip"]
    assert [c.method.name for c in grid.cells] == ["aware[transforms.scale=search]", "aware[transforms.scale=clip]"]
    assert grid.notes == ()


def test_a_transform_can_be_appended_and_taken_out(small: Composer) -> None:
    grid = compose_with(small, ["+transform@method.transforms.second=clip"], multirun=False)
    assert "adds to the defaults list of the root" in grid.notes[0]
    assert grid.cells[0].method.values["transforms"] == {"second": {"kind": "clip", "version": 1, "needs": [], "params": {"steps": 10}}}
    removed = compose_with(small, ["method=aware", "~transform@method.transforms.scale"], multirun=False).cells[0]
    assert "transforms" not in removed.method.values
    deleted = compose_with(small, ["~method.propagation"], multirun=False).cells[0]
    assert "propagation" not in deleted.method.values


def test_plus_adds_a_key_to_an_empty_mapping(small: Composer) -> None:
    grid = compose_with(small, ["+method.rounding.params.mse=true,false"], multirun=True)
    assert [c.method.values["rounding"]["params"] for c in grid.cells] == [{"mse": True}, {"mse": False}]
    assert [c.method.name for c in grid.cells] == ["plain[rounding.params.mse=true]", "plain[rounding.params.mse=false]"]


def test_equal_cells_are_kept_once(small: Composer) -> None:
    grid = compose_with(small, ["method=plain,plain", "replicate.seed=0,1"], multirun=True)
    assert [names(c, "method", "replicate") for c in grid.cells] == [("plain", "r0[seed=0]"), ("plain", "r0[seed=1]")]


def test_options_that_differ_in_the_order_of_a_mapping_alone_are_two(tmp_path: Path) -> None:
    open_ended = composer(tmp_path, method__open="rounding: {kind: rtn, version: 1, needs: [], params: {}}\noverrides: {}\n")
    given = ["method=open", "+method.overrides={a:{mse:true},b:{mse:false}},{b:{mse:false},a:{mse:true}}"]
    grid = compose_with(open_ended, given, multirun=True)
    assert [list(c.method.values["overrides"]) for c in grid.cells] == [["a", "b"], ["b", "a"]]


def test_the_last_of_equal_keys_wins(small: Composer) -> None:
    assert compose_with(small, ["method=hess", "method=plain"], multirun=False).cells[0].method.name == "plain"


def test_a_quoted_number_stays_text(small: Composer) -> None:
    cell = compose_with(small, ["model.hub.revision='0123'"], multirun=False).cells[0]
    assert cell.model.values["hub"]["revision"] == "0123"


OPTIONS = {
    "model": ["tiny", "large"],
    "method": ["plain", "hess", "aware"],
    "scheme": ["w4", "w4g64", "w2", "w8a8"],
    "calibration": ["text", "other"],
    "task": ["ppl", "div"],
    "replicate": ["r0", "r1"],
}
VALUES = {
    "method.rounding.params.damp": st.floats(0, 1).map(repr),
    "method.rounding.params.block_size": st.integers(1, 512).map(str),
    "method.transforms.scale.params.scale_grid": st.integers(1, 99).map(str),
    "++method.propagation": st.sampled_from(["original", "quantized"]),
    "task.params.window": st.integers(2, 4096).map(str),
    "replicate": st.builds("{{seed: {}}}".format, st.integers(0, 9)),
    "model.dtype": st.sampled_from(["float16", "${model.hub.id}2", "'bfloat16'"]),
    "data_dir": st.sampled_from(["/a", "null"]),
}
NEEDS = {"method.rounding.params": "hess", "method.transforms": "aware"}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    picked = {axis: draw(st.sampled_from(options)) for axis, options in OPTIONS.items()}
    lines = [f"{axis}={name}" for axis, name in picked.items()]
    for key, values in VALUES.items():
        needed = [m for prefix, m in NEEDS.items() if key.startswith(prefix)]
        if (not needed or picked["method"] in needed) and draw(st.booleans()):
            lines.append(f"{key}={draw(values)}")
    return draw(st.permutations(lines))


@settings(max_examples=10)
@given(line=command_lines())
def test_fast_cells_equal_hydras_own_compose(small: Composer, line: list[str]) -> None:
    if any("${model.hub.id}2" in x for x in line):
        line = [x for x in line if x != "model=tiny" and x != "model=large"]  # "tiny2" is no dtype
        line = [x.replace("${model.hub.id}2", "float16") for x in line]
    grid = compose_with(small, line, multirun=False)
    expected = hydra_values(small, line)
    assert grid.notes == ()
    assert {axis: getattr(grid.cells[0], axis).values for axis in AXES} == {axis: expected[axis] for axis in AXES}
    assert grid.settings == {k: v for k, v in expected.items() if k not in AXES}


RTN = "kind: rtn, version: 1, needs: []"
GPTQ = "kind: gptq, version: 2, needs: [hessian]"
OUTWARD = {
    "global package": ("method__far", f"# @package _global_\nmethod: {{rounding: {{{RTN}}}}}\n", "puts method/far into package"),
    "another axis": (
        "method__far",
        f"rounding: {{{GPTQ}, params: {{block_size: '${{scheme.weight.bits}}'}}}}\n",
        "refers outside its package",
    ),
    "cross-group default": (
        "method__far",
        f"defaults: [/scheme@_global_.scheme.overrides: w2, _self_]\nrounding: {{{RTN}}}\n",
        "puts scheme/w2",
    ),
    "resolver": ("method__far", f"rounding: {{{RTN}, supports: {{families: '${{oc.dict.keys:scheme}}'}}}}\n", "uses a resolver"),
    "sweep file": ("sweep__far", "# @package _global_\nmodel: {dtype: float16}\n", "sweep/far sets model from outside"),
}


@pytest.mark.parametrize("case", OUTWARD)
def test_a_grid_that_reaches_outside_goes_through_hydra_as_a_whole_and_says_why(tmp_path: Path, case: str) -> None:
    name, text, reason = OUTWARD[case]
    group = name.partition("__")[0]
    small = composer(tmp_path, **{name: text})
    lines = [f"{group}=far", "scheme=w4,w8a8"]
    grid = compose_with(small, lines, multirun=True)
    assert reason in grid.notes[0]
    for cell in grid.cells:
        expected = hydra_values(small, [lines[0], f"scheme={cell.scheme.name}"])
        assert {axis: getattr(cell, axis).values for axis in AXES} == {axis: expected[axis] for axis in AXES}


def test_the_slow_way_names_and_checks_values_too(tmp_path: Path) -> None:
    small = composer(tmp_path, method__far=OUTWARD["another axis"][1])
    grid = compose_with(small, ["method=far", "replicate.seed=3,4"], multirun=True)
    assert [c.replicate.name for c in grid.cells] == ["r0[seed=3]", "r0[seed=4]"]
    with pytest.raises(ConfigError, match=r"unknown key of task.params in task ppl 'windw'; nearest: window"):
        compose_with(small, ["method=far", "task.params.windw=3"], multirun=False)


def test_an_option_that_changes_a_setting_is_refused(tmp_path: Path) -> None:
    small = composer(tmp_path, method__far=f"# @package _global_\nmethod: {{rounding: {{{RTN}}}}}\ncluster: {{more: 1}}\n")
    with pytest.raises(ConfigError, match="changes cluster"):
        compose_with(small, ["method=plain,far"], multirun=True)


def test_a_setting_that_reads_an_axis_is_refused(tmp_path: Path) -> None:
    small = composer(tmp_path)
    with pytest.raises(ConfigError, match="hold for the whole sweep"):
        compose_with(small, ["store='${model.dtype}'"], multirun=False)


def test_params_of_a_named_sweep_are_axes_and_the_command_line_wins(tmp_path: Path) -> None:
    text = "# @package _global_\nsweep: {name: s}\nhydra: {sweeper: {params: {method: 'plain,hess', task: 'ppl,div'}}}\n"
    small = composer(tmp_path, sweep__s=text)
    grid = compose_with(small, ["sweep=s", "task=div"], multirun=True)
    assert [names(c, "method", "task") for c in grid.cells] == [("plain", "div"), ("hess", "div")]
    with pytest.raises(ConfigError, match="add -m"):
        compose_with(small, ["sweep=s"], multirun=False)


def test_jobs_of_a_launcher_become_one_grid_with_a_cell_per_job(small: Composer) -> None:
    jobs = [["method=hess", "method.rounding.params.damp=0.1"], ["method=plain"], ["method=hess", "method.rounding.params.damp=0.1"]]
    grid, cells = compose_jobs(small, jobs)
    assert len(grid.cells) == 2
    assert [c.method.name for c in cells] == ["hess[rounding.params.damp=0.1]", "plain", "hess[rounding.params.damp=0.1]"]
    assert cells[0] is cells[2] or cells[0] == cells[2]
    with pytest.raises(ConfigError, match="differ in settings"):
        compose_jobs(small, [["store=a"], ["store=b"]])


def test_files_found_beside_the_shipped_folder_are_options_too(tmp_path: Path) -> None:
    main = write_conf(tmp_path / "main")
    (tmp_path / "more" / "method").mkdir(parents=True)
    (tmp_path / "more" / "method" / "mine.yaml").write_text("rounding: {kind: nf4, version: 1, needs: []}\n")
    grid = compose_with(Composer.at(str(main), config_dir=str(tmp_path / "more")), ["method=mine,plain"], multirun=True)
    assert [c.method.values["rounding"]["kind"] for c in grid.cells] == ["nf4", "rtn"]


def test_a_root_of_ones_own_may_build_on_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nsite_statistics: true\n")
    (tmp_path / "sweep" / "wrong.yaml").write_text("# @package _global_\ndefaults: [none, _self_]\nmesure: true\n")
    grid = compose_grid(["method=rtn,gptq"], config_dir=str(tmp_path), config_name="mine", multirun=True)
    assert (len(grid.cells), grid.settings["site_statistics"], grid.settings["measure"]) == (2, True, False)
    with pytest.raises(ConfigError, match="unknown root key 'mesure'; nearest: measure"):
        compose_grid(["sweep=wrong"], config_dir=str(tmp_path), config_name="mine", multirun=True)


def test_rules_that_a_foreign_sweeper_ignores_are_noted(tmp_path: Path) -> None:
    small = composer(tmp_path, sweep__s="# @package _global_\nsweep: {name: s, exclude: [{method: plain}]}\n")
    grid, _ = compose_jobs(small, [["sweep=s", "method=plain"]])
    assert grid.notes == ("sweep.exclude had no effect: the sweeper in use chose the cells; hydra/sweeper=bitgrid applies rules",)
