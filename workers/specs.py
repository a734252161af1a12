"""Stage specs: everything that changes a stage's result, and nothing else.

Standard library only; shared with the driver, which hashes specs into keys. Paths, devices, batch sizes and thread
counts are never here: they travel in the request (`workers.request`) as locations and hints.

A field whose value equals its declared default is left out of the canonical form (`to_json`), so that adding a field
with a neutral default keeps all old keys.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from quant.scheme import ActivationScheme, KVScheme, WeightScheme

DTYPES = ("float32", "bfloat16", "float16")
PROPAGATIONS = ("original", "quantized")
SAMPLINGS = ("windows", "documents", "sequential")
WINDOWS = ("first", "spread")

Params = tuple[tuple[str, Any], ...]
"""Parameters by name, sorted; values are JSON values with lists as tuples."""


class StageKind(str, Enum):
    CALIBRATE = "calibrate"
    PREPARE = "prepare"
    QUANTIZE = "quantize"
    EVALUATE = "evaluate"
    MEASURE = "measure"


@dataclass(frozen=True)
class ModelSpec:
    digest: str
    """Content digest of weights, configuration and tokenizer files."""
    dtype: str = "float32"
    """Arithmetic of every forward pass: float32, bfloat16 or float16."""
    forward: int = 1
    """Version of how such a model is computed here (`families.forward_version`)."""


@dataclass(frozen=True)
class TextSpec:
    """A text, by content."""

    digest: str
    field: str | None = None
    """Key of the text in each row of JSON or of a hub data set; not read for plain text."""
    split: str = "rows"
    """How plain text becomes documents: rows (one a line), paragraphs (blank line between), endoftext (`<|endoftext|>`
    between) or whole."""
    join: str = "\n\n"
    """Put between documents before tokenizing."""
    documents: int | None = None
    """Only the first so many documents."""
    skip_documents: int = 0


@dataclass(frozen=True)
class CalibrationSpec:
    text: TextSpec
    samples: int = 128
    sequence_length: int = 2048
    """Tokens per sample."""
    seed: int = 0
    sampling: str = "windows"
    """windows: random windows of the joined text (GPTQ); documents: a random window of a random long enough document;
    sequential: consecutive windows from the start, whatever the seed."""


@dataclass(frozen=True)
class Component:
    """One transform, or the rounding or tuner of a method, as used."""

    name: str
    version: int
    params: Params = ()


@dataclass(frozen=True)
class MethodSpec:
    rounding: Component
    transforms: tuple[Component, ...] = ()
    """In order of application."""
    propagation: str = "original"
    """original: statistics of the unquantized model; quantized: later layers see quantized inputs (GPTQ's own order)."""


@dataclass(frozen=True)
class Rule:
    """One row of a quantize stage: the last pattern that matches a module decides."""

    pattern: str
    method: MethodSpec
    weight: WeightScheme


@dataclass(frozen=True)
class CalibrateSpec:
    model: ModelSpec
    calibration: CalibrationSpec
    statistic: str
    """hessian, absmax, absmean, minmax or samples; kv, kv_fisher or moments."""


@dataclass(frozen=True)
class PrepareSpec:
    """A search whose small result several quantize stages reuse."""

    model: ModelSpec
    kind: str
    """sensitivity."""
    version: int
    calibration: CalibrationSpec | None = None
    params: Params = ()


@dataclass(frozen=True)
class AutoBits:
    """Widths chosen per linear by a sensitivity table."""

    budget: float
    """Average stored bits per weight, at most."""
    candidates: tuple[WeightScheme, ...]
    version: int = 1
    """Of the choice: 1 stopped within a millionth of the largest loss in the table, 2 finds the least loss."""

    @staticmethod
    def role(index: int) -> str:
        """Of a candidate's quantize artifact among the inputs of the sensitivity table."""
        return f"candidate{index}"


@dataclass(frozen=True)
class QuantizeSpec:
    model: ModelSpec
    rules: tuple[Rule, ...]
    calibration: CalibrationSpec | None = None
    """Only where the stage itself feeds text: propagation=quantized, a tuner, or static activation ranges."""
    activation: ActivationScheme | None = None
    """Only where the artifact depends on it: static ranges, or a method that declares it reads this part."""
    kv: KVScheme | None = None
    seed: int | None = None
    """Only for methods that declare uses_seed."""
    auto: AutoBits | None = None
    """The one rule's weight scheme gives way to the candidates; the table is the input `sensitivity`."""


@dataclass(frozen=True)
class TaskSpec:
    kind: str
    """perplexity or divergence."""
    version: int
    text: TextSpec
    params: Params = ()
    windows: str = "first"
    """Which windows of the text are scored where `limit` leaves some out: first, or spread at equal distances, over more documents."""


@dataclass(frozen=True)
class EvaluateSpec:
    """Scores of a variant: the unquantized model unless the input `quantize` is given."""

    model: ModelSpec
    task: TaskSpec
    activation: ActivationScheme | None = None
    kv: KVScheme | None = None


@dataclass(frozen=True)
class Workload:
    """What is timed: a prompt that fills the cache, then tokens decoded one at a time."""

    batch: int = 1
    """Sequences at once."""
    prompt: int = 128
    """Tokens of each before the first one is decoded."""
    tokens: int = 32
    """Decoded of each."""
    backend: str = "auto"
    """Kernel of packed linears: auto, dense (weights dequantized once) or a backend of the kernels in `workers.packed`."""
    threads: int | None = None
    """Of a CPU; None: as the worker has."""


@dataclass(frozen=True)
class MeasureSpec:
    """Speed and memory of a variant on one kind of device: the unquantized model unless the input `quantize` is given."""

    model: ModelSpec
    workload: Workload
    device: str
    """Name that the device must have."""
    activation: ActivationScheme | None = None
    """As evaluated; a kernel rounds and multiplies in as few bits."""
    kv: KVScheme | None = None
    """Format of the cache, which a kernel reads packed. How an evaluation gets there (mode, prefill) is at its default here."""


Spec = CalibrateSpec | PrepareSpec | QuantizeSpec | EvaluateSpec | MeasureSpec
SPEC_TYPES: dict[StageKind, type[CalibrateSpec] | type[PrepareSpec] | type[QuantizeSpec] | type[EvaluateSpec] | type[MeasureSpec]] = {
    StageKind.CALIBRATE: CalibrateSpec,
    StageKind.PREPARE: PrepareSpec,
    StageKind.QUANTIZE: QuantizeSpec,
    StageKind.EVALUATE: EvaluateSpec,
    StageKind.MEASURE: MeasureSpec,
}


def freeze(value: Any) -> Any:
    """JSON value ▸ the hashable form used in `Params` (mappings become sorted pairs, lists tuples)."""
    if isinstance(value, Mapping):
        return tuple((str(k), freeze(value[k])) for k in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} has no stable form; use numbers, strings, lists and mappings")


def to_json(value: Any) -> Any:
    """Canonical JSON value of a spec: fields at their default left out, enums by value, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        out = {}
        for f in fields(value):
            v = getattr(value, f.name)
            if f.default is not MISSING and v == f.default and type(v) is type(f.default):
                continue
            out[f.name] = dict((k, to_json(x)) for k, x in v) if f.type == "Params" else to_json(v)
        return out
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} has no stable form in a spec")


T = TypeVar("T")


def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
    """Inverse of `to_json` for the spec dataclasses; an unknown field is an error."""
    known = _hints(typing.cast(Any, cls))
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    return cls(**{k: _parse(known[k], v) for k, v in data.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: Params if f.type == "Params" else hints[f.name] for f in fields(cls)}


def _parse(hint: Any, value: Any) -> Any:
    if hint == Params:
        return freeze(value)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _parse(next(a for a in typing.get_args(hint) if a is not type(None)), value)
    if origin is tuple:
        return tuple(_parse(typing.get_args(hint)[0], v) for v in value)
    if isinstance(hint, type) and is_dataclass(hint):
        return from_json(hint, value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if isinstance(value, bool) is not (hint is bool) or (hint in (int, str) and not isinstance(value, hint)):
        raise ValueError(f"got {value!r}, expected a value of type {getattr(hint, '__name__', hint)}")
    return float(value) if hint is float else value
