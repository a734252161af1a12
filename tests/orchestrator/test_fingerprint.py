"""Keys: equal content equal key, any change another key, no change over releases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fingerprint import canonical, digest, identity, stage_key
from quant.scheme import ActivationScheme, Granularity, KVScheme, WeightScheme
from workers.specs import (
    SPEC_TYPES,
    CalibrateSpec,
    CalibrationSpec,
    Component,
    EvaluateSpec,
    MeasureSpec,
    MethodSpec,
    ModelSpec,
    PrepareSpec,
    QuantizeSpec,
    Rule,
    Spec,
    StageKind,
    TaskSpec,
    TextSpec,
    Workload,
    freeze,
    from_json,
    to_json,
)

GOLDEN = Path(__file__).with_name("golden_keys.json")
"""Committed keys. A change here means that every user's store is recomputed: raise a version on purpose, never by accident."""

MODEL = ModelSpec("0123456789abcdef")
TEXT = TextSpec("fedcba9876543210", field="text", documents=7)
CALIBRATION = CalibrationSpec(TEXT, samples=16, sequence_length=128, seed=3)
GROUPED = WeightScheme(4, granularity=Granularity.GROUP, group_size=64)
GPTQ = MethodSpec(Component("gptq", 1, freeze({"damp": 0.01, "act_order": True})), (Component("awq", 2, freeze({"grid": [1, 2]})),))
EXAMPLES: dict[str, tuple[StageKind, Spec, dict[str, str]]] = {
    "calibrate": (StageKind.CALIBRATE, CalibrateSpec(MODEL, CALIBRATION, "hessian"), {}),
    "prepare": (
        StageKind.PREPARE,
        PrepareSpec(MODEL, "sensitivity", 1, CALIBRATION, freeze({"group_size": 64})),
        {"hessian": "k1"},
    ),
    "quantize": (StageKind.QUANTIZE, QuantizeSpec(MODEL, (Rule("*", GPTQ, GROUPED),)), {"hessian": "k1"}),
    "quantize_static": (
        StageKind.QUANTIZE,
        QuantizeSpec(
            replace(MODEL, dtype="bfloat16"),
            (Rule("*", GPTQ, WeightScheme(8, symmetric=True)),),
            calibration=CALIBRATION,
            activation=ActivationScheme(8, granularity=Granularity.TENSOR, dynamic=False),
            seed=1,
        ),
        {},
    ),
    "evaluate": (
        StageKind.EVALUATE,
        EvaluateSpec(MODEL, TaskSpec("perplexity", 1, TEXT, freeze({"window": 512})), kv=KVScheme(4, group_size=32)),
        {"quantize": "k2"},
    ),
    "measure": (StageKind.MEASURE, MeasureSpec(MODEL, Workload(batch=4), "NVIDIA H200"), {"quantize": "k2"}),
}


def test_keys_are_what_they_were() -> None:
    assert {name: stage_key(*example) for name, example in EXAMPLES.items()} == json.loads(GOLDEN.read_text())


def test_the_canonical_form_is_plain_text_in_one_order() -> None:
    """Whatever a machine's encoding: of a text with an accent its escape."""
    assert canonical({"b": [1, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,null]}'


@pytest.mark.parametrize("name", EXAMPLES)
def test_spec_survives_json(name: str) -> None:
    kind, spec, _ = EXAMPLES[name]
    assert from_json(SPEC_TYPES[kind], json.loads(canonical(to_json(spec)))) == spec


def test_field_at_its_default_is_not_in_the_canonical_form() -> None:
    assert "sampling" not in to_json(CALIBRATION)
    assert to_json(replace(CALIBRATION, sampling="sequential"))["sampling"] == "sequential"
    assert "windows" not in to_json(TaskSpec("perplexity", 1, TEXT))


def test_every_part_of_the_identity_changes_the_key() -> None:
    kind, spec, inputs = EXAMPLES["quantize"]
    assert isinstance(spec, QuantizeSpec)
    others = [
        (kind, replace(spec, seed=0), inputs),
        (kind, replace(spec, model=ModelSpec("other")), inputs),
        (kind, replace(spec, rules=(Rule("*", GPTQ, replace(GROUPED, bits=3)),)), inputs),
        (kind, replace(spec, rules=(Rule("*", replace(GPTQ, transforms=()), GROUPED),)), inputs),
        (kind, spec, {"hessian": "k9"}),
        (kind, spec, {"absmax": "k1"}),
    ]
    keys = {stage_key(*o) for o in [*others, (kind, spec, inputs)]}
    assert len(keys) == len(others) + 1


def test_order_of_transforms_is_identity_and_order_of_parameters_is_not() -> None:
    one, two = Component("a", 1), Component("b", 1)
    rounding = Component("rtn", 1)
    assert digest(to_json(MethodSpec(rounding, (one, two)))) != digest(to_json(MethodSpec(rounding, (two, one))))
    assert freeze({"x": 1, "y": [2]}) == freeze({"y": [2], "x": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_without_a_stable_form_is_refused(value: float) -> None:
    spec = CalibrateSpec(MODEL, CALIBRATION, "hessian")
    with pytest.raises(ValueError, match="JSON"):
        canonical({**identity(StageKind.CALIBRATE, spec, {}), "x": value})
    with pytest.raises(TypeError, match="no stable form"):
        freeze({"x": object()})


def test_unknown_field_and_wrong_type_are_told() -> None:
    with pytest.raises(ValueError, match="has no field smaples; it has"):
        from_json(CalibrationSpec, {"smaples": 3})
    with pytest.raises(ValueError, match="expected a value of type int"):
        from_json(WeightScheme, {"bits": "4"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_digests_are_equal_just_when_the_json_is(a: object, b: object) -> None:
    assert (digest(a) == digest(b)) == (canonical(a) == canonical(b))
