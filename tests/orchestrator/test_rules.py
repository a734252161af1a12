"""Rules of a named sweep: exclude, only_if, zip, extra; misspelt and idle rules are errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.cell import Grid
from orchestrator.errors import ConfigError
from orchestrator.grid import compose_with
from tests.orchestrator.small_conf import composer


def grid_of(folder: Path, rules: str, *overrides: str) -> Grid:
    text = f"# @package _global_\nsweep:\n  name: s\n{rules}"
    return compose_with(composer(folder, sweep__s=text), ["sweep=s", *overrides], multirun=True)


def pairs(grid: Grid) -> list[tuple[str, str]]:
    return [(c.method.name, c.scheme.name) for c in grid.cells]


GRID = ("method=plain,hess", "scheme=w4,w4g64,w2")


def test_exclude_removes_cells_that_match_every_key_and_lists_them_with_the_rule(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "  exclude: [{method: plain, scheme: [w2, '*g64']}]\n", *GRID)
    assert pairs(grid) == [("plain", "w4"), ("hess", "w4"), ("hess", "w4g64"), ("hess", "w2")]
    assert [(c.scheme.name, rule) for c, rule in grid.excluded] == [
        ("w4g64", "sweep.exclude {method: plain, scheme: [w2,*g64]}"),
        ("w2", "sweep.exclude {method: plain, scheme: [w2,*g64]}"),
    ]


def test_only_if_limits_the_cells_that_match_its_condition(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "  only_if: [{if: {method: plain}, then: {scheme: 'w4*'}}]\n", *GRID)
    assert pairs(grid) == [("plain", "w4"), ("plain", "w4g64"), ("hess", "w4"), ("hess", "w4g64"), ("hess", "w2")]
    assert "sweep.only_if {method: plain} then {scheme: 'w4*'}" in grid.excluded[0][1].replace("w4*}", "'w4*'}").replace("''", "'")


def test_a_rule_may_look_at_a_value_inside_an_option(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "  exclude: [{scheme.weight.bits: 2}]\n", *GRID)
    assert {scheme for _, scheme in pairs(grid)} == {"w4", "w4g64"}


def test_a_rule_may_name_a_swept_option_or_its_file(tmp_path: Path) -> None:
    swept = ("method=hess", "method.rounding.params.damp=0.1,0.2")
    grid = grid_of(tmp_path / "a", "  exclude: [{method: 'hess[rounding.params.damp=0.1]'}]\n", *swept)
    assert [m for m, _ in pairs(grid)] == ["hess[rounding.params.damp=0.2]"]
    with pytest.raises(ConfigError, match="leave no cell of 2"):
        grid_of(tmp_path / "b", "  exclude: [{method: hess}]\n", *swept)


def test_zipped_keys_move_together(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "  zip: [{model: [tiny, large], calibration: [text, other]}]\n", "replicate=r0,r1")
    assert [(c.model.name, c.calibration.name, c.replicate.name) for c in grid.cells] == [
        ("tiny", "text", "r0"),
        ("tiny", "text", "r1"),
        ("large", "other", "r0"),
        ("large", "other", "r1"),
    ]


def test_values_can_be_zipped_with_options(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "  zip: [{method: [hess, plain], calibration.samples: [4, 2]}]\n")
    assert [(c.method.name, c.calibration.name) for c in grid.cells] == [("hess", "text[samples=4]"), ("plain", "text[samples=2]")]


def test_the_command_line_narrows_a_zip(tmp_path: Path) -> None:
    rules = "  zip: [{model: [tiny, large], calibration: [text, other]}]\n"
    assert [c.calibration.name for c in grid_of(tmp_path / "a", rules, "model=large").cells] == ["other"]
    with pytest.raises(ConfigError, match="model=larger leaves nothing of the zipped axes model, calibration"):
        grid_of(tmp_path / "b", rules, "model=larger")


def test_extra_cells_run_over_the_axes_they_do_not_name_and_escape_the_rules(tmp_path: Path) -> None:
    rules = "  exclude: [{scheme: w8a8}, {scheme: w2}]\n  extra: [{method: hess, scheme: w8a8, method.rounding.params.damp: [0.5]}]\n"
    grid = grid_of(tmp_path, rules, "method=plain", "scheme=w4,w2,w8a8", "task=ppl,div")
    assert [(c.method.name, c.scheme.name, c.task.name) for c in grid.cells] == [
        ("plain", "w4", "ppl"),
        ("plain", "w4", "div"),
        ("hess[rounding.params.damp=0.5]", "w8a8", "ppl"),
        ("hess[rounding.params.damp=0.5]", "w8a8", "div"),
    ]


def test_an_extra_cell_that_is_in_the_product_is_kept_once(tmp_path: Path) -> None:
    assert pairs(grid_of(tmp_path, "  extra: [{method: plain, scheme: w4}]\n", *GRID)) == pairs(grid_of(tmp_path, "", *GRID))


def test_overrides_of_the_whole_sweep_hold_for_extra_cells(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "  extra: [{method: hess}]\n", "method=plain", "method.propagation=quantized")
    assert [(c.method.name, c.method.values["propagation"]) for c in grid.cells] == [("plain", "quantized"), ("hess", "quantized")]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("  exclude: [{metod: plain}]\n", "sweep.exclude: unknown axis 'metod'; nearest: method"),
        ("  exclude: [{method: plane}]\n", "sweep.exclude: unknown method 'plane'; nearest: plain"),
        ("  exclude: [{scheme: 'w9*'}]\n", "sweep.exclude: unknown scheme 'w9*'"),
        ("  exclude: [{method: []}]\n", "method has an empty list"),
        ("  exclude: {method: plain}\n", "expected a list of mappings"),
        ("  only_if: [{if: {method: plain}}]\n", "expected {if:"),
        ("  zip: [{model: [tiny, large], scheme: [w4]}]\n", "same length, got {'model': 2, 'scheme': 1}"),
        ("  zip: [{model: [tiny, large]}]\n", "two or more keys"),
        ("  zip: [{model: [tiny, large], scheme: [w4, 'w*']}]\n", "globs have no order to zip"),
        ("  zip: [{model: [tiny], scheme: [w4]}, {model: [tiny], task: [ppl]}]\n", "model is in two rows"),
        ("  extra: [{method: hes}]\n", "sweep.extra: unknown method 'hes'; nearest: hess"),
        ("  exlude: []\n", "unknown key of sweep 'exlude'; nearest: exclude"),
        ("stor: x\n", "unknown root key 'stor'; nearest: store"),
    ],
)
def test_a_wrong_rule_names_what_is_allowed(tmp_path: Path, rules: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        grid_of(tmp_path, rules, *GRID)


def test_a_rule_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    params = "hydra: {sweeper: {params: {method: 'plain,hess'}}}\n"
    with pytest.raises(ConfigError, match=r"sweep.exclude {method: aware} matches no cell of the grid, which has method: hess, plain"):
        grid_of(tmp_path, f"  exclude: [{{method: aware}}]\n{params}")


PARAMS = "hydra: {sweeper: {params: {method: 'plain,hess', scheme: 'w4,w4g64,w2'}}}\n"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("exclude: [{scheme.weight.bit: 2}]", "sweep.exclude: unknown key of scheme.weight 'bit'; nearest: bits"),
        ("only_if: [{if: {scheme.wieght.bits: 2}, then: {method: hess}}]", "unknown key of scheme 'wieght'; nearest: weight"),
        (
            "only_if: [{if: {scheme: w2}, then: {method.rounding.params.dmp: 0.01}}]",
            "sweep.only_if: unknown key of method.rounding.params 'dmp'; nearest: damp",
        ),
        (
            "only_if: [{if: {method: plain}, then: {scheme.weight.granularity: gruop}}]",
            "sweep.only_if {method: plain} then {scheme.weight.granularity: gruop} keeps no cell: all that match its condition would go",
        ),
        ("exclude: [{transform@method.transforms.scale: clip}]", "transform@method.transforms.scale chooses a file; name values inside"),
        ("only_if: [{if: {method: plain}, then: {scheme: w8a8}}]", "then {scheme: w8a8} keeps no cell"),
    ],
)
def test_what_is_misspelt_inside_an_option_is_told_and_drops_no_cell(tmp_path: Path, rule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        grid_of(tmp_path, f"  {rule}\n{PARAMS}")


def test_a_key_that_some_options_have_serves_for_all(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, f"  only_if: [{{if: {{scheme: w2}}, then: {{method.rounding.params.damp: 0.01}}}}]\n{PARAMS}")
    assert [m for m, s in pairs(grid) if s == "w2"] == ["hess"]
    assert len(grid.cells) == 5


def test_a_glob_is_for_text_alone(tmp_path: Path) -> None:
    """It fits no option that lacks the key, and no number."""
    rule = "  exclude: [{method.transforms.scale.kind: 'a*'}]\n"
    assert {m for m, _ in pairs(grid_of(tmp_path / "a", rule, "method=plain,aware", "scheme=w4,w2"))} == {"plain"}
    with pytest.raises(ConfigError, match="matches no cell"):
        grid_of(tmp_path / "b", f"  exclude: [{{scheme.weight.bits: '[24]'}}]\n{PARAMS}")


def test_a_key_that_the_command_line_leaves_no_option_is_only_noted(tmp_path: Path) -> None:
    rule = "  exclude: [{method.rounding.params.damp: 0.01}]\n"
    grid = grid_of(tmp_path, f"{rule}{PARAMS}", "method=plain", "scheme=w4")
    assert pairs(grid) == [("plain", "w4")]
    assert grid.notes == ("sweep.exclude {method.rounding.params.damp: 0.01} matches no cell: the command line narrowed the grid",)


def test_a_then_that_the_command_line_leaves_nothing_is_only_noted(tmp_path: Path) -> None:
    rule = "  only_if: [{if: {method: plain}, then: {scheme.weight.bits: 2}}]\n"
    grid = grid_of(tmp_path, f"{rule}{PARAMS}", "scheme=w4")
    assert pairs(grid) == [("hess", "w4")]
    assert grid.notes == ("sweep.only_if {method: plain} then {scheme.weight.bits: 2} keeps no cell: the command line narrowed the grid",)


def test_a_rule_made_idle_by_the_command_line_is_only_noted(tmp_path: Path) -> None:
    params = "hydra: {sweeper: {params: {method: 'plain,hess'}}}\n"
    grid = grid_of(tmp_path, f"  exclude: [{{method: hess}}]\n{params}", "method=plain")
    assert grid.notes == ("sweep.exclude {method: hess} matches no cell: the command line narrowed the grid",)


def test_rules_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "  exclude: []\n", *GRID, "sweep.exclude=[{method: plain}]")
    assert {m for m, _ in pairs(grid)} == {"hess"}


def test_a_setting_among_the_params_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a setting of the whole sweep"):
        grid_of(tmp_path, "hydra: {sweeper: {params: {store: here}}}\n")
