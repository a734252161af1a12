"""A key that is misspelt or missing in an option's own yaml is told before anything is planned."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cell import AXES
from orchestrator.config import check_option
from orchestrator.errors import ConfigError
from orchestrator.grid import compose_grid
from orchestrator.option_keys import OPTIONS, Keys


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    """Axis ▸ values of an option with every kind of mapping in it."""
    lines = ["method=awq", "calibration=c4", "task=wikitext2", "model=gpt2", "scheme=auto", "budget=3.2"]
    (cell,) = compose_grid(lines, multirun=False).cells
    return {axis: getattr(cell, axis).values for axis in AXES}


def changed(values: Any, path: str, value: Any = None) -> Any:
    """A copy with another value at the path, or, for None, without it."""
    out = copy.deepcopy(values)
    *above, last = path.split(".")
    place = out
    for part in above:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return out


def required(keys: Keys, values: Any, path: str = "") -> list[str]:
    """Dotted paths of all keys that `values` must have."""
    here = [f"{path}{key}" for key in keys.required]
    below = keys.below if keys.each is None else dict.fromkeys(values, keys.each)
    return here + [p for k, inner in below.items() if values.get(k) for p in required(inner, values[k], f"{path}{k}.")]


def test_shipped_options_have_what_they_must_and_each_of_it_is_missed(shipped: dict[str, Any]) -> None:
    found = {axis: required(OPTIONS[axis], shipped[axis]) for axis in AXES}
    assert {"rounding", "rounding.needs", "rounding.version", "transforms.awq.kind"} <= set(found["method"])
    assert {"text", "text.hub.id", "metrics", "metrics.ppl.higher_is_better"} <= set(found["task"])
    assert found["replicate"] == ["seed"]
    for axis in AXES:
        check_option(axis, "mine", shipped[axis])
        for path in found[axis]:
            with pytest.raises(ConfigError, match=f"{axis}=mine: .* needs a value for '{path.rpartition('.')[2]}'"):
                check_option(axis, "mine", changed(shipped[axis], path))


@pytest.mark.parametrize(
    ("axis", "path", "value", "message"),
    [
        ("calibration", "sampels", 32, "unknown key of calibration 'sampels'; nearest: samples"),
        ("calibration", "text.feild", "x", "unknown key of calibration.text 'feild'; nearest: field"),
        ("task", "text.hub.splt", "x", "unknown key of task.text.hub 'splt'; nearest: split"),
        ("task", "metrics.ppl.higher", True, "unknown key of task.metrics.ppl 'higher'; nearest: higher_is_better"),
        ("task", "parms", {}, "unknown key of task 'parms'; nearest: params"),
        ("method", "propogation", "quantized", "unknown key of method 'propogation'; nearest: propagation"),
        ("method", "rounding.need", [], "unknown key of method.rounding 'need'; nearest: needs"),
        ("method", "transforms.awq.use_seed", True, "unknown key of method.transforms.awq 'use_seed'; nearest: uses_seed"),
        ("model", "dtpye", "float16", "unknown key of model 'dtpye'; nearest: dtype"),
        ("model", "hub.comit", "x", "unknown key of model.hub 'comit'; allowed: id, revision"),
        ("scheme", "wieght", {}, "unknown key of scheme 'wieght'; nearest: weight"),
        ("replicate", "sede", 3, "unknown key of replicate 'sede'; nearest: seed"),
        ("method", "rounding", "gptq", "method.rounding is 'gptq'; expected a mapping"),
        ("method", "transforms", ["awq"], "method.transforms is ['awq']; expected a mapping"),
        ("method", "rounding.params", [1], "method.rounding.params is [1]; expected a mapping"),
        ("calibration", "text", "c4", "calibration.text is 'c4'; expected a mapping"),
    ],
)
def test_what_is_misspelt_is_told_with_the_nearest_key(shipped: dict[str, Any], axis: str, path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{axis}=mine: {message}")):
        check_option(axis, "mine", changed(shipped[axis], path, value))


def test_parts_that_are_left_out_or_null_are_no_mistake(shipped: dict[str, Any]) -> None:
    check_option("method", "mine", {**shipped["method"], "transforms": {"awq": None}})
    check_option("method", "mine", {"rounding": {"kind": "rtn", "version": 1, "needs": []}})
    check_option("model", "mine", {"folder": "mine", "hub": None})
    with pytest.raises(ConfigError, match=r"task.metrics.ppl is None; expected a mapping"):
        check_option("task", "mine", {**shipped["task"], "metrics": {"ppl": None}})


def test_a_yaml_file_of_ones_own_is_checked(tmp_path: Path) -> None:
    sweep = "# @package _global_\ndefaults: [none, _self_]\nhints: {batch_token: 3}\n"
    for group, text in {"replicate": "sede: 3\n", "sweep": sweep}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="replicate=mine: unknown key of replicate 'sede'; nearest: seed"):
        compose_grid(["replicate=mine"], config_dir=str(tmp_path), multirun=False)
    with pytest.raises(ConfigError, match="unknown key of hints 'batch_token'; nearest: batch_tokens"):
        compose_grid(["sweep=mine"], config_dir=str(tmp_path), multirun=True)
