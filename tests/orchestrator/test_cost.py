"""Estimates order stages by work, grow with the model, and give way to history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from orchestrator.cost import estimate, what
from quant.scheme import Granularity, WeightScheme
from workers.specs import (
    AutoBits,
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
    TaskSpec,
    TextSpec,
    Workload,
)

MODEL = ModelSpec("digest")
CALIBRATION = CalibrationSpec(TextSpec("text"), samples=16, sequence_length=128)


@dataclass(frozen=True)
class Facts:
    digest: str
    config: Mapping[str, Any]
    weight_bytes: int


def llama(layers: int = 2, digest: str | None = None) -> Facts:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "vocab_size": 100,
        "dtype": "float16",
    }
    parameters = layers * (4 * 64 * 64 + 3 * 64 * 128) + 100 * 64
    return Facts(digest or f"llama {layers}", config, 2 * parameters)


def quantized(method: str, *transforms: str, bits: int = 4, group_size: int | None = None, propagation: str = "original") -> QuantizeSpec:
    weight = WeightScheme(bits, granularity=Granularity.GROUP if group_size else Granularity.CHANNEL, group_size=group_size)
    spec = MethodSpec(Component(method, 1), tuple(Component(t, 1) for t in transforms), propagation)
    return QuantizeSpec(MODEL, (Rule("*", spec, weight),), CALIBRATION if propagation == "quantized" else None)


def evaluated(**params: int) -> EvaluateSpec:
    return EvaluateSpec(MODEL, TaskSpec("perplexity", 1, TextSpec("text"), tuple(sorted(params.items()))))


def seconds(spec: Spec, model: Facts | None = None) -> float:
    return estimate(spec, model or llama(), {}).seconds


def test_more_work_takes_longer() -> None:
    assert seconds(CalibrateSpec(MODEL, CALIBRATION, "absmax")) < seconds(CalibrateSpec(MODEL, CALIBRATION, "hessian"))
    assert seconds(quantized("rtn")) < seconds(quantized("gptq")) < seconds(quantized("gptq", propagation="quantized"))
    assert seconds(quantized("rtn")) < seconds(quantized("rtn", "awq"))
    for less, more in (
        (Workload(prompt=64), Workload(prompt=4096)),
        (Workload(tokens=16), Workload(tokens=4096)),
        (Workload(batch=1), Workload(batch=8)),
    ):
        assert seconds(MeasureSpec(MODEL, less, "cpu")) < seconds(MeasureSpec(MODEL, more, "cpu"))
    tables = [PrepareSpec(MODEL, "sensitivity", 1, CALIBRATION, (("sequences", n),)) for n in (4, 8)]
    assert seconds(tables[0]) < seconds(tables[1])
    assert seconds(evaluated(window=128, max_windows=4)) < seconds(evaluated(window=128, max_windows=8)) < seconds(evaluated(window=128))


@pytest.mark.parametrize("spec", [CalibrateSpec(MODEL, CALIBRATION, "hessian"), quantized("gptq"), evaluated(window=128)])
def test_a_larger_model_takes_more_of_everything(spec: Spec) -> None:
    small, large = estimate(spec, llama(2), {}), estimate(spec, llama(8), {})
    assert small.seconds < large.seconds
    assert small.output_bytes <= large.output_bytes


def test_stored_size_follows_bits_and_groups() -> None:
    def size(spec: QuantizeSpec) -> int:
        return estimate(spec, llama(), {}).output_bytes

    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert size(quantized("rtn", bits=4)) == weights // 2
    assert size(quantized("rtn", bits=4, group_size=32)) == int(weights * (4 + 20 / 32) / 8)


def test_automatic_bits_are_stored_within_their_budget() -> None:
    # The rule's own width holds a place; a budget counts scales and zeros too.
    spec = replace(quantized("rtn", bits=2, group_size=64), auto=AutoBits(3.25, (WeightScheme(2), WeightScheme(8))))
    assert estimate(spec, llama(), {}).output_bytes == int(2 * (4 * 64 * 64 + 3 * 64 * 128) * 3.25 / 8)


def test_history_replaces_the_guess_and_narrows_it() -> None:
    spec, model = quantized("gptq"), llama()
    guess = estimate(spec, model, {})
    known = estimate(spec, model, {("quantize", model.digest, what(spec)): 12.5})
    assert known.seconds == 12.5
    assert known.uncertainty < guess.uncertainty
    assert estimate(spec, llama(8), {("quantize", model.digest, what(spec)): 12.5}).seconds != 12.5


def test_bit_widths_share_history_and_methods_do_not() -> None:
    assert what(quantized("gptq", bits=4)) == what(quantized("gptq", bits=3))
    names = [
        what(quantized("gptq")),
        what(quantized("rtn")),
        what(quantized("rtn", "awq")),
        what(quantized("gptq", propagation="quantized")),
    ]
    assert len(set(names)) == len(names)


def test_a_model_outside_the_table_still_gets_an_estimate() -> None:
    assert estimate(evaluated(window=128), Facts("rwkv", {"model_type": "rwkv"}, 4_000_000), {}).seconds > 0
