"""Option values ▸ typed parts of specs. One function per axis; wrong values raise ConfigError naming option and field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from orchestrator.cell import Cell, Option
from orchestrator.config import IDLE, READ_WITH, check_params, check_whole
from orchestrator.errors import ConfigError, PlanError, unknown_name
from orchestrator.param_files import FILES, with_files_read
from orchestrator.planned import ToolkitNeed
from orchestrator.results import TaskInfo
from orchestrator.sources import TextSource
from quant.scheme import ActivationScheme, KVScheme, Scheme, Supports, WeightScheme
from workers.errors import UnsupportedModel
from workers.rotatable import recollects, rotatable
from workers.specs import (
    PROPAGATIONS,
    SAMPLINGS,
    WINDOWS,
    AutoBits,
    CalibrationSpec,
    Component,
    MethodSpec,
    TaskSpec,
    TextSpec,
    freeze,
    from_json,
)

STATISTICS = ("hessian", "absmax", "absmean", "minmax", "samples")
"""What a calibrate stage can collect for a method."""
SITE_STATISTICS = "moments"
"""What a calibrate stage collects for the report alone, as `workers.site_moments` calls it."""
LEAST_OF_TEXT = {"documents": 1, "skip_documents": 0}
"""Below, a slice would take documents from the end of the text."""
LEAST_OF_TASK = {"limit": 1, "max_windows": 1}
SEEDS = (-(2**63), 2**63 - 1)
"""What torch's generators take."""
LEAST_WINDOW = 2
"""What `workers.tasks.base.cut` takes."""


T = TypeVar("T")


@dataclass(frozen=True)
class MethodPart:
    """A method and what planning must know of it."""

    spec: MethodSpec
    calibrate: tuple[str, ...]
    """Statistics it takes from calibrate stages, sorted."""
    feeds_text: bool
    """The quantize stage itself runs calibration text: propagation=quantized, a search on text, or a tuner."""
    reads: frozenset[str]
    """Run-time parts of the scheme its result depends on: activation, kv; and text, which a search is fed."""
    uses_seed: bool
    idle_without_activation: tuple[str, ...]
    """Names of transforms that only help quantized activations."""
    supports: tuple[tuple[str, Supports], ...] = ()
    """Of each transform and the rounding, by name."""
    maps: frozenset[str] | None = None
    """Statistics that carry over through its transform of the whole model; None where it has none."""
    toolkit: ToolkitNeed | None = None
    """The environment that its quantize stage needs."""

    def refuses(self, weight: WeightScheme, family: str | None) -> str | None:
        """Why the method cannot make this weight scheme on this family of models."""
        return next((r for name, s in self.supports if (r := s.refuses(name, weight, family)) is not None), None)

    def cannot_rotate(self, config: Mapping[str, Any]) -> str | None:
        """Why the model's residual stream cannot be rotated; None where it can, or need not be."""
        try:
            if self.maps is not None:
                rotatable(config)
        except UnsupportedModel as e:
            return str(e)
        return None

    def recollects(self, config: Mapping[str, Any]) -> str | None:
        """Why the quantize stage itself collects the statistics, of a rotated model; None where calibrate stages do."""
        if self.maps is None or not self.calibrate or self.cannot_rotate(config) is not None:
            return None
        return recollects(rotatable(config), frozenset(self.calibrate), self.maps)


@dataclass(frozen=True)
class TaskPart:
    spec: TaskSpec
    needs_reference: bool
    info: TaskInfo


def method_part(option: Option) -> MethodPart:
    values = option.values
    rounding = values["rounding"]
    transforms = [t for t in (values.get("transforms") or {}).values() if t is not None and not _idle(t)]
    propagation = values.get("propagation", "original")
    if propagation not in PROPAGATIONS:
        raise ConfigError(f"method {option.name!r}: {unknown_name('propagation', str(propagation), PROPAGATIONS)}")
    if propagation == "original" and (rounding.get("params") or {}).get("true_sequential"):
        raise ConfigError(
            f"method {option.name!r}: true_sequential=true does nothing with propagation=original, which takes all statistics from the "
            "unquantized model; set method.propagation=quantized too, or leave it false"
        )
    late = next((t for t in transforms[1:] if "maps" in t), None)
    if late is not None:
        raise ConfigError(
            f"method {option.name!r}: {late['kind']} rewrites the whole model: it must be the first transform; got "
            f"{', '.join(t['kind'] for t in transforms)}"
        )
    components = [*transforms, rounding]
    needs = {s for c in components for s in c["needs"]}
    for statistic in sorted(needs):
        if statistic not in STATISTICS:
            raise PlanError(
                f"method {option.name!r} needs a statistic that no calibrate stage collects: "
                + unknown_name("statistic", statistic, STATISTICS)
            )
    return MethodPart(
        spec=MethodSpec(_component(option, rounding), tuple(_component(option, t) for t in transforms), propagation),
        # With propagation=quantized the stage collects all of them itself, from inputs that earlier blocks have changed.
        calibrate=tuple(sorted(needs)) if propagation == "original" else (),
        feeds_text=propagation == "quantized" or any("text" in c.get("reads", ()) or c.get("feeds_text", False) for c in components),
        reads=frozenset(r for c in components for r in c.get("reads", ())),
        uses_seed=any(c.get("uses_seed", False) for c in components),
        idle_without_activation=tuple(t["kind"] for t in transforms if t.get("for_activations", False)),
        supports=tuple((str(c["kind"]), supports_part(option, c)) for c in components),
        maps=next((frozenset(t["maps"]) for t in transforms if "maps" in t), None),
        toolkit=ToolkitNeed(rounding["toolkit"], str(rounding["params"]["release"])) if "toolkit" in rounding else None,
    )


def _idle(transform: Mapping[str, Any]) -> bool:
    parameter, value = IDLE.get(transform["kind"], (None, None))
    return parameter is not None and (transform.get("params") or {}).get(parameter) == value


def supports_part(option: Option, component: Mapping[str, Any]) -> Supports:
    """What a component's yaml says it works on; what it leaves out is the usual."""
    return _checked(option, "supports", lambda: from_json(Supports, component.get("supports") or {}))


def _component(option: Option, values: Mapping[str, Any]) -> Component:
    def made() -> Component:
        params = values.get("params") or {}
        conditions = READ_WITH.get(values["kind"], {})
        read = {n: v for n, v in params.items() if n not in conditions or params.get(conditions[n][0]) == conditions[n][1]}
        whole = with_files_read(read)
        check_params(f"method={option.name}", "params", values["kind"], {n: v for n, v in whole.items() if n in FILES})
        return Component(values["kind"], values["version"], freeze(whole))

    return _checked(option, "params", made)


def scheme_part(option: Option) -> Scheme:
    values = option.values
    types: dict[str, type[Any]] = {"weight": WeightScheme, "activation": ActivationScheme, "kv": KVScheme}
    parts = {n: _checked(option, n, lambda n=n: from_json(types[n], values[n])) for n in types if values.get(n) is not None}  # type: ignore[misc]
    activation = parts.get("activation")
    if activation is not None and activation.outlier_threshold is not None:
        activation = parts["activation"] = replace(activation, outlier_version=2)
    if activation is not None and activation.number in ("mxfp4", "mxfp8"):
        parts["activation"] = replace(activation, number_version=2)
    if parts.get("kv") is not None and parts["kv"].first_few_fp16:
        parts["kv"] = replace(parts["kv"], first_few_version=2)
    made = Scheme(**parts)
    if made.activation is not None and made.activation.by_sequence and made.kv is not None and made.kv.mode == "decode":
        return replace(made, activation=replace(made.activation, steps_version=2))
    return made


@dataclass(frozen=True)
class AutoPart:
    """Widths chosen per linear under a budget (`scheme=auto`)."""

    auto: AutoBits
    sequences: int
    """Of the calibration set, for the sensitivity table."""


def auto_part(option: Option, weight: WeightScheme | None) -> AutoPart | None:
    """`auto: {budget, bits, sequences}` of a scheme. Raises ConfigError."""
    values = option.values.get("auto")
    if values is None:
        return None
    where = f"scheme={option.name}: auto"
    allowed = ("budget", "bits", "sequences")
    for name in values:
        if name not in allowed:
            raise ConfigError(f"{where}: {unknown_name('key', str(name), allowed)}")
    budget, bits, sequences = values.get("budget"), values.get("bits"), values.get("sequences", 8)
    if weight is None:
        raise ConfigError(f"{where} chooses weight.bits, and weight is null; give the scheme's weight part")
    if not isinstance(budget, (int, float)) or isinstance(budget, bool) or not 0 < budget < math.inf:
        raise ConfigError(f"{where}.budget={budget!r}; give the average stored bits per weight, as budget=3.2")
    if not isinstance(bits, list) or len(bits) < 2 or len(set(bits)) != len(bits) or not all(type(b) is int for b in bits):
        raise ConfigError(f"{where}.bits={bits!r}; give at least two different widths to choose from, as [2,3,4]")
    if budget <= min(bits):
        raise ConfigError(f"{where}.budget={budget} stored bits per weight is not above the smallest width, {min(bits)}, and its scales")
    if not isinstance(sequences, int) or isinstance(sequences, bool) or sequences < 1:
        raise ConfigError(f"{where}.sequences={sequences!r}; give a whole number from 1")
    candidates = _checked(option, "auto.bits", lambda: tuple(replace(weight, bits=b) for b in sorted(bits)))
    return AutoPart(AutoBits(float(budget), candidates, version=2), sequences)


def text_part(option: Option, source: TextSource) -> TextSpec:
    text = option.values["text"]
    names = ("field", "split", "join", "documents", "skip_documents")
    values = {n: text[n] for n in names if n in text}
    _check_least(f"{option.axis} {option.name!r}: text", values, LEAST_OF_TEXT)
    return _checked(option, "text", lambda: from_json(TextSpec, {"digest": source.digest, **values}))


def calibration_part(option: Option, source: TextSource, replicate_seed: int) -> CalibrationSpec:
    names = ("samples", "sequence_length", "seed", "sampling")
    values = {n: option.values[n] for n in names if n in option.values}
    spec = _checked(option, "", lambda: from_json(_CalibrationSettings, values))
    if spec.sampling not in SAMPLINGS:
        raise ConfigError(f"calibration {option.name!r}: {unknown_name('sampling', spec.sampling, SAMPLINGS)}")
    if spec.samples < 1 or spec.sequence_length < 2:
        raise ConfigError(
            f"calibration {option.name!r}: samples={spec.samples} must be at least 1 and sequence_length={spec.sequence_length} at least 2"
        )
    # Consecutive windows are the same whatever the seed.
    seed = 0 if spec.sampling == "sequential" else spec.seed + replicate_seed
    # Python's generator takes a seed without its sign: -1 would draw the samples of 1, as if replicates agreed.
    check_whole(f"calibration {option.name!r}: seed with the replicate's added", seed, 0, SEEDS[1])
    return CalibrationSpec(text_part(option, source), spec.samples, spec.sequence_length, seed, spec.sampling)


@dataclass(frozen=True)
class _CalibrationSettings:
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    sampling: str = "windows"


def task_part(option: Option, source: TextSource) -> TaskPart:
    values = option.values
    metrics = {name: bool(m["higher_is_better"]) for name, m in values["metrics"].items()}
    if values["primary"] not in metrics:
        raise ConfigError(f"task {option.name!r}: {unknown_name('primary metric', values['primary'], metrics)}")
    windows = values.get("windows", WINDOWS[0])
    if windows not in WINDOWS:
        raise ConfigError(f"task {option.name!r}: {unknown_name('windows', str(windows), WINDOWS)}")
    text = text_part(option, source)
    params = values.get("params") or {}
    if "window" in params:
        check_whole(f"task {option.name!r}: params.window", params["window"], LEAST_WINDOW)
    _check_least(f"task {option.name!r}: params", params, LEAST_OF_TASK)
    spec = _checked(option, "params", lambda: TaskSpec(values["kind"], values["version"], text, freeze(params), windows))
    info = TaskInfo(option.name, values["kind"], values["primary"], metrics)
    return TaskPart(spec, bool(values.get("needs_reference", False)), info)


def _check_least(where: str, values: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Null is the key's own: all of the text, in most."""
    for name, bound in least.items():
        if values.get(name) is not None:
            check_whole(f"{where}.{name}", values[name], bound)


def draw(cell: Cell, several: Mapping[str, bool], calibration: CalibrationSpec | None, *, seeded: bool = False) -> str:
    """For a stage's label: its calibration set and replicate, where the sweep has several and the stage depends on them."""
    names = [cell.calibration.name] if calibration is not None and several["calibration"] else []
    if several["replicate"] and (seeded or (calibration is not None and calibration.sampling != "sequential")):
        names.append(cell.replicate.name)
    return "".join(f" {name}" for name in names)


def replicate_seed(option: Option) -> int:
    seed: int = option.values["seed"]
    check_whole(f"replicate {option.name!r}: seed", seed, *SEEDS)
    return seed


def _checked(option: Option, part: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except (ValueError, TypeError, KeyError) as e:
        where = f"{option.axis}={option.name}" + (f", {part}" if part else "")
        raise ConfigError(f"{where}: {e.args[0] if isinstance(e, KeyError) else e}") from e
