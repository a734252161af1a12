"""Estimates per stage: seconds and bytes written. They order the schedule and fill `bitgrid plan`; nothing depends on them.

Seconds are floating-point operations over one assumed rate, plus a fixed cost per stage, until stages of the same kind, model
and `what` have run: then their mean. Only ratios matter to the scheduler, and these come from the operations:

    forward      2 P per token (P: parameters)
    Hessian      2 K² per token and distinct input of K values
    GPTQ         2 K³ + 2 N K² per linear [N, K] (Cholesky factor and inverse; the error spread over the columns to the right)
    scale search 20 candidates, each a forward of every block over 4 Ki tokens (AWQ's grid)
    tuning       8 P per token (forward, backward, loss of the iterate) and 100 P per step (quantizing with gradients)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.stage import Resources
from quant.scheme import KVScheme
from workers.errors import WorkerError
from workers.families import linear_shapes
from workers.specs import CalibrateSpec, EvaluateSpec, MeasureSpec, MethodSpec, PrepareSpec, QuantizeSpec, Spec, StageKind

History = Mapping[tuple[str, str, str], float]
"""(kind, model digest, `what(spec)`) ▸ mean seconds of finished stages."""

OPERATIONS_PER_S = 4e10
"""Of one CPU core in float32; the history corrects it on anything else."""
STAGE_S = 0.3
"""Reading inputs, writing and committing."""
TASK_TOKENS = 300_000
"""Of an evaluation text without a limit: about WikiText-2's test split."""
SEARCH_TOKENS = 20 * 4096
CANDIDATES = 4
"""Widths of a sensitivity table, about."""
STEPWISE = 3
"""Decoding a text step by step against one pass over it."""
TIMED_RUNS = 20
"""Of a measurement, about, with what it is checked against."""
UNKNOWN = 4.0
"""Factor by which an estimate without history is easily wrong."""


class ModelFacts(Protocol):
    """`orchestrator.sources.ModelSource` is one."""

    @property
    def digest(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def weight_bytes(self) -> int: ...


@dataclass(frozen=True)
class _Size:
    parameters: int
    linear_parameters: int
    linears: tuple[tuple[int, int], ...]
    """[N, K] of each."""
    inputs: tuple[int, ...]
    """K of each distinct input."""


_sizes: dict[tuple[str, int], _Size] = {}


def what(spec: Spec) -> str:
    """What makes one stage of a kind and model slower than another: statistic, method, or task."""
    if isinstance(spec, CalibrateSpec):
        return f"{spec.statistic} {spec.calibration.samples}x{spec.calibration.sequence_length}"
    if isinstance(spec, PrepareSpec):
        return f"{spec.kind} {spec.params}"
    if isinstance(spec, QuantizeSpec):
        return " ".join(_method_name(rule.method) for rule in spec.rules)
    if isinstance(spec, MeasureSpec):
        return f"{spec.device} {spec.workload}{_cache(spec.kv)}"
    return f"{spec.task.kind} {spec.task.text.digest[:12]} {spec.task.params}{_cache(spec.kv)}"


def _cache(kv: KVScheme | None) -> str:
    return "" if kv is None else f" kv {kv.kind} {kv.mode}"


def estimate(spec: Spec, model: ModelFacts, history: History) -> Resources:
    """Of one stage. Never raises for a model that cannot be quantized: planning says so elsewhere."""
    size = _size(model)
    if isinstance(spec, CalibrateSpec):
        kind, seconds, output = StageKind.CALIBRATE, _calibrate_s(spec, size), _statistic_bytes(spec, size)
    elif isinstance(spec, PrepareSpec):
        kind, seconds, output = StageKind.PREPARE, _sensitivity_s(spec, size), 64 * len(size.linears)
    elif isinstance(spec, QuantizeSpec):
        kind, seconds, output = StageKind.QUANTIZE, _quantize_s(spec, size), _stored_bytes(spec, size)
    elif isinstance(spec, MeasureSpec):
        tokens = spec.workload.batch * (spec.workload.prompt + spec.workload.tokens)
        kind, seconds, output = StageKind.MEASURE, _seconds(2 * size.parameters * tokens * TIMED_RUNS), 2**14
    else:
        tokens = _task_tokens(spec)
        steps = STEPWISE if spec.kv is not None and spec.kv.mode == "decode" else 1
        kind, seconds, output = StageKind.EVALUATE, _seconds(2 * size.parameters * tokens * steps), 16 * tokens
    seen = history.get((kind.value, model.digest, what(spec)))
    guess = UNKNOWN if model.weight_bytes else math.inf  # of a model that the hub did not tell of nothing is known
    return Resources(
        seconds=seconds if seen is None else seen,
        output_bytes=output,
        uncertainty=guess if seen is None else 1.0,
    )


def _seconds(operations: float) -> float:
    return STAGE_S + operations / OPERATIONS_PER_S


def _size(model: ModelFacts) -> _Size:
    key = (model.digest, model.weight_bytes)
    if key not in _sizes:
        _sizes[key] = _measure(model)
    return _sizes[key]


def _measure(model: ModelFacts) -> _Size:
    config = model.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    value_bytes = 2 if dtype in ("float16", "bfloat16") else 4
    parameters = max(1, model.weight_bytes // value_bytes)
    try:
        shapes = linear_shapes(config)
    except (WorkerError, KeyError, TypeError, ValueError):
        shapes = ()
    return _Size(
        parameters=parameters,
        linear_parameters=min(parameters, sum(s.rows * s.cols for s in shapes)),
        linears=tuple((s.rows, s.cols) for s in shapes),
        inputs=tuple(s.cols for s in shapes if s.name == s.site),
    )


def _calibrate_s(spec: CalibrateSpec, size: _Size) -> float:
    tokens = spec.calibration.samples * spec.calibration.sequence_length
    hessian = 2 * sum(k * k for k in size.inputs) if spec.statistic == "hessian" else 0
    backward = 4 * size.parameters if spec.statistic == "kv_fisher" else 0
    return _seconds(tokens * (2 * size.linear_parameters + hessian + backward))


def _sensitivity_s(spec: PrepareSpec, size: _Size) -> float:
    """Half a forward, on average, for every linear and candidate."""
    sequences, length = dict(spec.params).get("sequences", 8), spec.calibration.sequence_length if spec.calibration else 1
    return _seconds(size.parameters * sequences * length * len(size.linears) * CANDIDATES)


def _quantize_s(spec: QuantizeSpec, size: _Size) -> float:
    operations = 50.0 * size.linear_parameters
    names = {c.name for rule in spec.rules for c in (*rule.method.transforms, rule.method.rounding)}
    if names & {"gptq", "claq", "llm_compressor"}:
        operations += sum(2 * k**3 + 2 * n * k * k for n, k in size.linears)
    if names & {"awq", "qllm_reassembly"}:
        operations += 2 * size.linear_parameters * SEARCH_TOKENS
    if spec.calibration is not None:
        # The text passes every block twice: to collect, and through the quantized block to feed the next one.
        operations += 4 * size.linear_parameters * spec.calibration.samples * spec.calibration.sequence_length
        steps, sequences = max(_steps(rule.method, spec.calibration.samples) for rule in spec.rules)
        operations += size.linear_parameters * (100 * steps + 8 * sequences * spec.calibration.sequence_length)
    return _seconds(operations)


def _steps(method: MethodSpec, samples: int) -> tuple[int, int]:
    """Steps of a tuner, and sequences that they read."""
    params = dict(method.rounding.params)
    if "epochs" in params:
        return int(params["epochs"]) * samples, int(params["epochs"]) * samples
    return int(params.get("iters") or 0), int(params.get("iters") or 0) * int(params.get("batch_size") or 0)


def _task_tokens(spec: EvaluateSpec) -> int:
    params = dict(spec.task.params)
    window, windows = params.get("window"), params.get("max_windows") or params.get("limit")
    return int(window) * int(windows) if window and windows else TASK_TOKENS


def _statistic_bytes(spec: CalibrateSpec, size: _Size) -> int:
    tokens = spec.calibration.samples * spec.calibration.sequence_length
    values = {"hessian": sum(k * k for k in size.inputs), "samples": tokens * sum(size.inputs) // max(1, spec.calibration.samples)}
    values["moments"] = 16 * (len(size.inputs) + len(size.linears))
    return 4 * values.get(spec.statistic, sum(size.inputs))


def _stored_bytes(spec: QuantizeSpec, size: _Size) -> int:
    if spec.auto is not None:
        return int(size.linear_parameters * spec.auto.budget / 8)
    weight = spec.rules[-1].weight
    # A scale of 16 bits and a zero of `bits` per group.
    bits = weight.bits + ((16 + weight.bits) / weight.group_size if weight.group_size else 0)
    return int(size.linear_parameters * bits / 8)


def _method_name(method: MethodSpec) -> str:
    parts = [*(t.name for t in method.transforms), method.rounding.name]
    return "+".join(parts) + ("" if method.propagation == "original" else f"@{method.propagation}")
