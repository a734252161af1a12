"""The shipped conf/: every option composes, the fast way equals Hydra's own, the named sweeps are what they say."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.cell import AXES
from orchestrator.config import CHOICES, IDLE, READ_WITH, check_option
from orchestrator.errors import ConfigError
from orchestrator.grid import compose_grid, compose_with
from orchestrator.hydra_bridge import Composer
from orchestrator.parts import MethodPart, method_part, scheme_part
from quant import parameters
from workers.specs import Component, freeze

COMPOSER = Composer.at()
OPTIONS = {axis: COMPOSER.options(axis) for axis in AXES}
NUMBERS = {
    "gptq": {"method.rounding.params.damp": "0.05", "method.rounding.params.block_size": "64", "method.propagation": "quantized"},
    "awq": {"method.transforms.awq.params.scale_grid": "7", "method.transforms.awq.params.clip_search": "false"},
    "rtn": {"method.rounding.params.mse": "true"},
}
RTN = {"kind": "rtn", "version": 1, "needs": []}


@pytest.fixture(scope="module", autouse=True)
def hydra_on_conf() -> Iterator[None]:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        yield


def test_every_option_composes_alone() -> None:
    for axis in AXES:
        grid = compose_with(COMPOSER, [f"{axis}=glob(*)"], multirun=True)
        assert [getattr(c, axis).name for c in grid.cells] == OPTIONS[axis]
        assert grid.notes == ()


@settings(max_examples=5)
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
    assert rows.count(("clip_gptq[transforms.clip.params.kind=learned]", "w2a16_channel")) == 2
    assert {rule.split(" ")[0] for _, rule in grid.excluded} == {"sweep.exclude", "sweep.only_if"}
    assert grid.notes == ()


def test_a_named_sweep_sets_what_belongs_to_the_whole_sweep_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [none, _self_]\nbudget: 3.2\nhints: {batch_tokens: 512}\ndata_dir: texts\n"
    )
    plain = compose_grid([], multirun=True).settings
    mine = compose_grid(["sweep=mine"], config_dir=str(tmp_path), multirun=True).settings
    assert mine == {**plain, "budget": 3.2, "data_dir": "texts", "hints": {**plain["hints"], "batch_tokens": 512}}
    given = compose_grid(["sweep=mine", "budget=4", "hints.batch_tokens=64"], config_dir=str(tmp_path), multirun=True).settings
    assert given == {**mine, "budget": 4, "hints": {**mine["hints"], "batch_tokens": 64}}


def test_words_of_the_configuration_are_those_of_the_code() -> None:
    from workers import datasets, specs

    assert set(CHOICES["calibration", "text.split"]) == set(CHOICES["task", "text.split"]) == set(datasets.SPLITS)
    assert set(CHOICES["calibration", "sampling"]) == set(datasets.SAMPLINGS)
    # Left out of the key; every shipped task keeps the key it had.
    for task in compose_grid(["task=glob(*)"], multirun=True).cells:
        assert task.task.values["windows"] == specs.TaskSpec("", 1, specs.TextSpec("")).windows


def test_kept_outliers_and_mx_inputs_have_keys_of_their_later_rules_and_other_schemes_the_keys_they_had() -> None:
    for cell in compose_grid(["scheme=glob(*)"], multirun=True).cells:
        activation = scheme_part(cell.scheme).activation
        if activation is not None:
            assert activation.outlier_version == (2 if activation.outlier_threshold is not None else 1)
            assert activation.number_version == (2 if activation.number.startswith("mx") else 1)
            assert activation.steps_version == 1


def test_first_tokens_that_are_kept_have_keys_of_a_calibration_without_them() -> None:
    grid = compose_grid(["scheme=w16a16kv3_kvquant", "scheme.kv.first_few_fp16=0,1"], multirun=True)
    found = [part.kv for part in (scheme_part(cell.scheme) for cell in grid.cells) if part.kv is not None]
    assert [(kv.first_few_fp16, kv.first_few_version) for kv in found] == [(0, 1), (1, 2)]


def test_tokens_that_share_a_range_have_keys_of_steps_of_one_token() -> None:
    grid = compose_grid(
        ["scheme=w4a4kv4_channel", "scheme.activation.granularity=token,tensor", "scheme.kv.mode=simulate,decode"], multirun=True
    )
    found = {
        (str(part.activation.granularity.value), part.kv.mode): part.activation.steps_version
        for part in (scheme_part(cell.scheme) for cell in grid.cells)
        if part.activation is not None and part.kv is not None
    }
    assert found == {("token", "simulate"): 1, ("token", "decode"): 1, ("tensor", "simulate"): 1, ("tensor", "decode"): 2}


def classes() -> dict[str, dict[str, Any]]:
    from quant.methods import registry as r

    return {"rounding": {**r.ROUNDINGS, **r.TUNERS, **r.TOOLKIT_METHODS}, "transform": {**r.TRANSFORMS, **r.MODEL_TRANSFORMS}}


def test_the_table_of_parameters_is_that_of_the_classes() -> None:
    tables = {"rounding": parameters.ROUNDINGS, "transform": parameters.TRANSFORMS}
    for role, made in classes().items():
        assert set(tables[role]) == set(made)
        for kind, params in tables[role].items():
            hints, defaults = typing.get_type_hints(made[kind]), made[kind]()
            assert list(params) == [f.name for f in dataclasses.fields(made[kind])], kind
            for name, param in params.items():
                kinds = set(typing.get_args(hints[name])) if param.null else {hints[name]}
                assert {dict if typing.get_origin(t) is tuple else t for t in kinds} == {param.type, *([type(None)] if param.null else [])}
                assert param.takes(getattr(defaults, name)), (kind, name)


def test_words_are_those_that_the_code_looks_up() -> None:
    from quant import affine, grids, reassembly
    from quant.kernels import kmeans_columns

    whole = (affine.ZeroKind.CONSTANT, affine.ZeroKind.CODE, affine.ZeroKind.INTEGER)
    assert set(parameters.GRIDS) == {*grids.GRIDS, *grids.ALIASES}
    assert {n for n in parameters.GRIDS if grids.grid(n).zero in whole} == set(parameters.ROUNDINGS["learned_rounding"]["grid"].words)
    assert set(parameters.ROUNDINGS["claq"]["kmeans_start"].words) == set(kmeans_columns.STARTS)
    assert set(parameters.TRANSFORMS["qllm_reassembly"]["variant"].words) == set(reassembly.DISTANCES)


def outside(param: parameters.Param) -> list[Any]:
    """Values that `param` has no place for: of other types, at ends that are excluded, past those that are not."""
    if param.type is tuple:
        assert param.each is not None
        return [None, "wrong", 1, *([value] for value in outside(param.each))]
    wrong: list[Any] = [[1], *([] if param.null else [None])]
    wrong += ["wrong"] if param.words or param.type is not str else [1]
    wrong += [1, 0.5] if param.type in (bool, dict) else [True]
    if param.type is int:
        wrong += [1.5, int(param.least) - 1] + ([int(param.most) + 1] if param.most < math.inf else [])
    if param.type is float:
        assert param.least > -math.inf or param.above > -math.inf
        wrong += [math.nan, -math.inf, param.least - 1e-3 if param.least > -math.inf else param.above]
        wrong += [param.most + 1e-3] if param.most < math.inf else [param.below] if not param.endless else []
    if param.each is not None:
        wrong += [{"*": value} for value in outside(param.each)]
    return wrong


@pytest.mark.parametrize("role", ["rounding", "transform"])
def test_what_a_class_refuses_is_refused_while_composing(role: str) -> None:
    refused = 0
    for kind, made in classes()[role].items():
        for name, param in {**parameters.ROUNDINGS, **parameters.TRANSFORMS}[kind].items():
            for value in outside(param):
                given = tuple(value.items()) if isinstance(value, dict) else value
                with pytest.raises(
                    ValueError, match=rf"^{name}=.* is not a value for {kind}; give {re.escape(param.allowed)}(; did you mean|$)"
                ):
                    made(**{name: given})
                component = {"kind": kind, "version": 1, "needs": [], "params": {name: value}}
                path = "method.rounding" if role == "rounding" else "method.transforms.t"
                method = {"rounding": component} if role == "rounding" else {"rounding": RTN, "transforms": {"t": component}}
                if isinstance(value, str) and param.type is dict:
                    continue  # the path of a file, whose content is checked
                with pytest.raises(
                    ConfigError, match=rf"^method=mine: (unknown )?{re.escape(path)}.params.{name}\b.*(not a value|allowed: )"
                ):
                    check_option("method", "mine", method)
                refused += 1
    assert refused > 100


def test_what_planning_leaves_out_exists_and_is_not_the_default() -> None:
    """That it changes no result is tested beside each class."""
    for kind in IDLE.keys() | READ_WITH.keys():
        default: Any = classes()["transform"][kind]()
        words = parameters.TRANSFORMS[kind]
        if kind in IDLE:
            parameter, value = IDLE[kind]
            assert getattr(default, parameter) != value
            assert value in words[parameter].words
        for name, (parameter, value) in READ_WITH.get(kind, {}).items():
            assert hasattr(default, name)
            assert value in words[parameter].words


@pytest.mark.parametrize(
    ("method", "line", "message"),
    [
        ("billm", "method.rounding.params.variant=papr", "unknown method.rounding.params.variant 'papr'; nearest: paper"),
        ("claq", "method.rounding.params.kmeans_start=random", "unknown method.rounding.params.kmeans_start 'random'"),
        ("owq", "method.rounding.params.outlier_metric=quick", "unknown method.rounding.params.outlier_metric 'quick'; nearest: quik"),
        ("qllm", "method.transforms.qllm_reassembly.params.variant=eq5", "unknown method.transforms.qllm_reassembly.params.variant 'eq5'"),
        ("gptq", "+method.overrides={*.q_proj:{outlier_metric:quick}}", "unknown method.overrides.*.q_proj.outlier_metric 'quick'"),
        ("gptq", "+method.overrides={*.q_proj:{grid:g_assym}}", "unknown method.overrides.*.q_proj.grid 'g_assym'; nearest: g_asym"),
        (
            "gptq",
            "method.rounding.params.damp=-1",
            "method.rounding.params.damp=-1 is not a value for gptq; give a number from 0; a fraction of mean(diag H), 0.01 is usual",
        ),
        ("spqr", "method.rounding.params.outlier_threshold=inf", "method.rounding.params.outlier_threshold=inf has no place in a key"),
        ("hqq", "method.rounding.params.beta=inf", "method.rounding.params.beta=inf is not a value for hqq; give a number above 0"),
        (
            "awq",
            "method.transforms.awq.params.max_shrink=2",
            "method.transforms.awq.params.max_shrink=2 is not a value for awq; give a number above 0 up to 1",
        ),
        (
            "billm",
            "method.rounding.params.salient_columns=1.5",
            "method.rounding.params.salient_columns=1.5 of type float is not a value for billm; give a whole number from 0 or null (",
        ),
        (
            "gptq",
            "method.rounding.params.block_size=null",
            "method.rounding.params.block_size=null is not a value for gptq; give a whole number from 1",
        ),
        ("gptq", "+method.overrides={*.q_proj:{damp:'0.1'}}", "method.overrides.*.q_proj.damp=0.1 of type str is not a value for gptq"),
        ("gptq", "+method.overrides={*.q_proj:{damp:-1}}", "method.overrides.*.q_proj.damp=-1 is not a value for gptq"),
        ("gptq", "+method.overrides={*.q_proj:{dampp:1}}", "unknown key of method.overrides.*.q_proj 'dampp'; nearest: damp"),
        (
            "claq",
            "method.rounding.params.layer_bits={a:5}",
            "method.rounding.params.layer_bits={a:5} is not a value for claq; give a mapping to a number from 2 to 4",
        ),
        (
            "slim_llm",
            "method.rounding.params.bit_lists={a:q}",
            "method.rounding.params.bit_lists={a:q} is not a value for slim_llm; give a mapping to a list, each element a whole",
        ),
    ],
)
def test_parameters_of_methods_are_checked_while_composing(method: str, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"method={method}: {message}")):
        compose_with(COMPOSER, [f"method={method}", line], multirun=False)


def test_of_a_sweep_over_a_parameter_the_value_that_is_out_of_range_is_told() -> None:
    message = r"method=gptq\[rounding.params.damp=-1\]: method.rounding.params.damp=-1 is not a value for gptq; give a number from 0;"
    with pytest.raises(ConfigError, match=message):
        compose_with(COMPOSER, ["method=gptq", "method.rounding.params.damp=0.01,-1"], multirun=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"rounding": RTN | {"kind": "gtpq"}}, "unknown method.rounding.kind 'gtpq'; nearest: gptq"),
        ({"rounding": RTN | {"kind": "awq"}}, "unknown method.rounding.kind 'awq'"),
        ({"rounding": RTN, "transforms": {"t": RTN}}, "unknown method.transforms.t.kind 'rtn'"),
        ({"rounding": RTN | {"params": {"msee": True}}}, "unknown key of method.rounding.params 'msee'; nearest: mse"),
    ],
)
def test_a_method_of_ones_own_is_checked(method: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"method=mine: {message}")):
        check_option("method", "mine", method)


@pytest.mark.parametrize(("transform", "changed"), [("smoothquant", []), ("awq", ["method.rounding.params.grid=awq_asym"]), ("clip", [])])
def test_a_transform_can_be_put_in_front_of_a_rounding_and_the_usual_pairs_are_shipped(transform: str, changed: list[str]) -> None:
    pair = compose_with(COMPOSER, [f"method={transform}_gptq"], multirun=False).cells[0].method
    lines = ["method=gptq", f"+transform@method.transforms.{transform}={transform}", *changed]
    assert compose_with(COMPOSER, lines, multirun=False).cells[0].method.values == pair.values


def method_parts(*lines: str) -> list[MethodPart]:
    return [method_part(c.method) for c in compose_with(COMPOSER, lines, multirun=True).cells]


def test_the_kinds_of_clipping_are_one_axis_and_none_is_the_method_without_it() -> None:
    kind = "method.transforms.clip.params.kind=none,symmetric,asymmetric,learned"
    made = method_parts("method=clip_gptq", kind, "method.transforms.clip.params.iters=50,20")
    (plain,) = method_parts("method=gptq")
    assert made[:2] == [plain, plain]
    # Keys of the searches are those they had before there was anything to learn.
    old = {"steps": 20, "max_shrink": 0.5, "grid": None}
    params = [{**old, "kind": k} for k in ("symmetric", "symmetric", "asymmetric", "asymmetric")]
    params += [{**old, "kind": "learned", "iters": i, "lr": 0.02} for i in (50, 20)]
    assert [p.spec for p in made[2:]] == [replace(plain.spec, transforms=(Component("clip", 1, freeze(p)),)) for p in params]


def test_clipping_that_is_off_needs_no_statistics_and_refuses_nothing() -> None:
    lines = ("method=rtn", "+transform@method.transforms.c=clip_output", "method.transforms.c.params.kind=none,asymmetric")
    off, on = method_parts(*lines)
    assert off == replace(on, spec=replace(on.spec, transforms=()), calibrate=(), supports=on.supports[1:])
    assert (on.calibrate, [name for name, _ in on.supports]) == (("hessian",), ["clip_output", "rtn"])


def test_ten_thousand_cells_share_their_options() -> None:
    grid = compose_grid(["method=gptq", "method.rounding.params.damp=range(0,1,0.01)", "replicate.seed=range(100)"], multirun=True)
    assert len(grid.cells) == 10_000
    assert len({id(option) for cell in grid.cells for option in cell}) == 204
