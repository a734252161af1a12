"""What is in memory while a model is quantized is what the method declares: a block, n blocks, or the model.

Measured in bytes of live tensors (`tests.live_bytes`), on models of one family that differ in their number of blocks alone, without
the garbage collector: memory must be free as soon as nothing uses it, not when the collector comes by.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.methods.registry import METHODS, MODEL_METHODS, ROUNDERS, Recipe
from quant.scheme import ANY_NUMBER, ActivationScheme, Granularity, WeightScheme
from quant.statistics import KINDS
from tests.live_bytes import LiveBytes
from tests.quick import QUICK
from tests.tiny_models import build, save_tokenizer
from tests.workers.stage_runs import CALIBRATION, calibrated, component, context, quantize_spec, quantized
from workers import families, kv_capture, recipe, site_moments
from workers.context import Context
from workers.quantize import quantize_blocks, run_quantize
from workers.rebuild import load_model, rebuild
from workers.rounding import Method, make_methods
from workers.specs import ModelSpec, QuantizeSpec
from workers.stream import open_blocks

pytestmark = pytest.mark.xdist_group("working_set")

MODEL = ModelSpec("model")
TEXT = replace(CALIBRATION, samples=1, sequence_length=8)
GROUP = 16
BLOCKS = {"few": 2, "many": 3}
"""Numbers of blocks that are compared, in units of those that the method holds. With one unit nothing would come before it."""
LEFT = 1024
"""Bytes that may outlast a stage: tables that the process keeps. One linear of these models has 2048 at least."""


def bit_per_weight(ctx: Context, pattern: str = "*") -> float:
    """Bytes of one block's linears at one bit per weight: less than any form of them that could be kept by mistake. What a method may
    keep of every block are vectors (the scale of a norm, for one)."""
    shapes = families.linear_shapes(open_blocks(ctx, MODEL).checkpoint.config)
    return sum(s.rows * s.cols for s in shapes if s.block == 0 and fnmatchcase(s.name, pattern)) / 8


@dataclass(frozen=True)
class Made:
    """A model and its statistics."""

    context: Context
    statistics: dict[str, Path]
    calibrate_peak: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Made]:
    @cache
    def of(blocks: int) -> Made:
        folder = tmp_path_factory.mktemp(f"blocks{blocks}")
        # Stored in 16 bits: the 32 bits that are worked with are then memory of their own, not a view of the file.
        shape = {"num_hidden_layers": blocks, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 32}
        build("llama", **shape).to(torch.bfloat16).save_pretrained(folder / "model")
        save_tokenizer(folder / "model")
        ctx = context(folder / "model", folder, streamed=True)
        with measured() as live:
            statistics = calibrated(ctx, folder, *KINDS, kv_capture.KIND, site_moments.KIND)
        return Made(ctx, {kind: statistics[kind] for kind in KINDS}, live.peak)

    return of


class AtOnce:
    """In place of the thread that writes a block while the next is worked on: how long it takes would decide what is in memory."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done

    def shutdown(self) -> None: ...


@pytest.fixture(autouse=True)
def written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "ThreadPoolExecutor", AtOnce)


@contextmanager
def measured() -> Iterator[LiveBytes]:
    gc.disable()
    try:
        with LiveBytes() as live:
            yield live
    finally:
        gc.enable()


def spec_of(recipe: Recipe, **more: Any) -> QuantizeSpec:
    """Four bits where the method makes them, else the most it makes; quantized activations where they change what it does. One linear
    of every block where no transform needs them together: what is in memory beside it is the same, in a fifth of the time."""
    supports = ROUNDERS[recipe.rounding].supports
    number = "int" if supports.numbers == ANY_NUMBER else supports.numbers[0]
    bits = 4 if 4 in supports.bits else max(supports.bits)
    granularity, size = (Granularity.CHANNEL, None) if "channel" in supports.granularity else (Granularity.GROUP, GROUP)
    weight = WeightScheme(bits, number != "int", granularity, size, number=number)
    params = {**recipe.rounding_params, **QUICK.get(recipe.rounding, {})}
    transforms = tuple(component(t, **QUICK.get(t, {})) for t in recipe.transforms)
    pattern = "*" if transforms else "*.down_proj"
    spec = quantize_spec(recipe.rounding, *transforms, weight=weight, pattern=pattern, **more, **params)
    if any("activation" in part.reads for part in only_method(spec).parts):
        spec = replace(spec, activation=ActivationScheme(8, symmetric=False), calibration=CALIBRATION)
    return spec if spec.calibration is None else replace(spec, calibration=TEXT)


def only_method(spec: QuantizeSpec) -> Method:
    (method,) = make_methods(spec.rules)
    return method


def declared(method: Method) -> str:
    """By the classes: `blocks(n)` names the parameter."""
    if method.whole is not None and method.whole.working_set != "block":
        return method.whole.working_set
    if method.tuner is None:
        return "block"
    return re.sub(r"\((\w+)\)", lambda m: f"({getattr(method.tuner, m[1])})", method.tuner.working_set)


@dataclass(frozen=True)
class Run:
    peak: int
    summary: dict[str, Any]
    most_loaded: int
    """Blocks at once."""


def run(spec: QuantizeSpec, of: Made, payload: Path, *, release: bool = True) -> Run:
    payload.mkdir()
    needs = only_method(spec).needs if spec.rules[0].method.propagation == "original" else frozenset[str]()
    inputs = {kind: path for kind, path in of.statistics.items() if kind in needs}
    loaded: list[int] = []
    with measured() as live:
        model = open_blocks(of.context, MODEL)
        model.on_load.append(lambda _, now=model.loaded: loaded.append(len(now)))  # type: ignore[misc]
        summary = quantize_blocks(spec, inputs, payload, of.context, model, model.release if release else lambda _: None)
    return Run(live.peak, summary, max(loaded))


CASES: dict[str, QuantizeSpec] = {
    **{name: spec_of(recipe) for name, recipe in {**METHODS, **MODEL_METHODS}.items()},
    "gptq, text fed": spec_of(METHODS["gptq"], propagation="quantized", true_sequential=True),
    "rtn, static ranges": replace(
        spec_of(METHODS["rtn"]), activation=ActivationScheme(8, granularity=Granularity.TENSOR, dynamic=False), calibration=TEXT
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_grows_with_the_declared_working_set_alone(case: str, made: Callable[[int], Made], tmp_path: Path) -> None:
    spec = CASES[case]
    tuner = only_method(spec).tuner
    width = 1 if tuner is None else tuner.blocks
    few, many = (run(spec, made(n * width), tmp_path / name) for name, n in BLOCKS.items())
    assert few.summary["working_set"]["declared"] == declared(only_method(spec))
    assert few.most_loaded == many.most_loaded == width
    growth = (many.peak - few.peak) / ((BLOCKS["many"] - BLOCKS["few"]) * width)
    if declared(only_method(spec)) == "model":
        assert growth >= many.summary["working_set"]["block_bytes"], "it needs less than it declares"
    else:
        assert growth < bit_per_weight(made(BLOCKS["few"] * width).context, spec.rules[0].pattern)


def test_more_blocks_together_take_more_memory(made: Callable[[int], Made], tmp_path: Path) -> None:
    """Of one model: a working set is no larger than it says. The float32 weights of one block more, at least."""
    spec = CASES["qllm_correction"]
    (rule,) = spec.rules
    alone = replace(rule, method=replace(rule.method, rounding=component("qllm_correction", blocks=1, epochs=1)))
    two, one = run(spec, made(4), tmp_path / "two"), run(replace(spec, rules=(alone,)), made(4), tmp_path / "one")
    assert two.peak - one.peak >= two.summary["working_set"]["block_bytes"]


def test_calibrate_holds_one_block(made: Callable[[int], Made]) -> None:
    few, many = (made(n) for n in BLOCKS.values())
    assert many.calibrate_peak - few.calibrate_peak < bit_per_weight(few.context)


def test_blocks_that_are_not_given_up_are_seen(made: Callable[[int], Made], tmp_path: Path) -> None:
    """The measure itself: every block more costs its weights."""
    few, many = (run(CASES["rtn"], made(n), tmp_path / name, release=False) for name, n in BLOCKS.items())
    assert many.peak - few.peak >= many.summary["working_set"]["block_bytes"]
    assert [few.most_loaded, many.most_loaded] == list(BLOCKS.values())


@pytest.mark.parametrize("case", ["rtn", "quarot", "omniquant", "learned_rotation"])
def test_nothing_stays_after_the_stage(case: str, made: Callable[[int], Made], tmp_path: Path) -> None:
    of = made(2)
    inputs = {kind: path for kind, path in of.statistics.items() if kind in only_method(CASES[case]).needs}
    (tmp_path / "payload").mkdir()
    with measured() as live:
        run_quantize(CASES[case], inputs, tmp_path / "payload", of.context)
        left = live.now  # outside, the collector would have been by
    assert left <= LEFT < live.peak


@pytest.mark.parametrize("quantized_one", [False, True])
def test_a_model_that_is_let_go_is_freed(quantized_one: bool, made: Callable[[int], Made], tmp_path: Path) -> None:
    """Or two variants would be resident while one takes the other's place."""
    of = made(2)
    ctx = replace(of.context, hints=replace(of.context.hints, streamed=False))
    artifact, _ = quantized(ctx, tmp_path / "q", CASES["rtn"], {})
    with measured() as live:
        model = rebuild(ctx, MODEL, artifact) if quantized_one else load_model(ctx, MODEL)
        assert live.now >= sum(p.nbytes for p in model.parameters())
        del model
        assert live.now <= LEFT
