"""A measurement of a mixture of experts compares one function with itself, though rounding alone may choose other experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.scheme import ActivationScheme, KVScheme, WeightScheme
from tests.tiny_models import config_of, save_tokenizer
from tests.workers.stage_runs import context, quantize_spec, quantized
from workers import comparison, generation, measure, routing
from workers.comparison import TOLERANCE
from workers.errors import NumericalError
from workers.machine import cpu_model
from workers.measure import run_measure
from workers.rebuild import load_model, rebuild_packed
from workers.residency import Residency
from workers.routing import Choices
from workers.specs import MeasureSpec, ModelSpec, Workload

MODEL = ModelSpec("model", "bfloat16")
SPEC = MeasureSpec(MODEL, Workload(batch=1, prompt=32, tokens=32, threads=1), cpu_model())
BYTES = replace(quantize_spec(weight=WeightScheme(8, True)), model=MODEL)


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as there may be."""
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)


@pytest.fixture(scope="module", params=[1, 2], ids=["top1", "top2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose routers find one expert more than they choose alike, but for about what bfloat16 rounds off; the experts are not."""
    made = tmp_path_factory.mktemp("mixtral")
    k = request.param
    config = config_of("mixtral", hidden_size=64, intermediate_size=64, num_local_experts=6, num_experts_per_tok=k, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(torch.bfloat16)
        with torch.no_grad():
            for layer in model.model.layers:
                alike = layer.mlp.gate.weight.view(-1, k + 1, 64)
                alike[:, 1:] = alike[:, :1] * (1 + 2.0**-7 * (torch.randint(0, 2, alike[:, 1:].shape) * 2 - 1))
    model.save_pretrained(made)
    save_tokenizer(made)
    return made


@pytest.fixture
def artifact(folder: Path, tmp_path: Path) -> Path:
    return quantized(context(folder, tmp_path), tmp_path / "q", BYTES, {})[0]


def measured(folder: Path, artifact: Path, tmp_path: Path, **more: Any) -> tuple[float, list[str]]:
    """check_error, and the notes on choices."""
    streamed = more.pop("streamed", False)
    ctx = context(folder, tmp_path, streamed=streamed)
    found = run_measure(replace(SPEC, **more), {"quantize": artifact}, tmp_path, ctx, Residency())
    return found["check_error"], [n for n in ctx.notes if "choices of experts" in n]


def test_experts_that_rounding_chooses_are_no_error(folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, notes = measured(folder, artifact, tmp_path)
    assert error <= TOLERANCE["bfloat16"] / 2
    (note,) = notes
    other, given = int(note.split()[0]), int(note.split()[2])
    assert given == 2 * (32 + 32)
    assert 0 < other < given / 2
    monkeypatch.setattr(routing, "_routers", lambda model: [])
    monkeypatch.setattr(comparison, "jittered", nullcontext)
    with pytest.raises(NumericalError, match="logits with packed weights differ"):
        measured(folder, artifact, tmp_path)


def test_a_streamed_model_gives_the_same_choices(folder: Path, artifact: Path, tmp_path: Path) -> None:
    """Whose steps pass a block one after another, before the next block."""
    assert measured(folder, artifact, tmp_path, streamed=True) == measured(folder, artifact, tmp_path)


@pytest.mark.parametrize("more", [{"activation": ActivationScheme(8)}, {"kv": KVScheme(8)}], ids=["activation", "kv"])
def test_choices_do_not_count_as_what_rounding_inputs_changes(
    more: dict[str, Any], folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tolerance would be as wide as experts are different."""
    noises: list[float] = []
    require = comparison.require_close

    def required(what: str, error: float, allowed: float) -> None:
        noises.extend([allowed - TOLERANCE["bfloat16"]] if what == "logits" else [])
        require(what, error, allowed)

    monkeypatch.setattr(comparison, "require_close", required)
    monkeypatch.setattr(comparison, "jittered", nullcontext)
    measured(folder, artifact, tmp_path, **more)
    monkeypatch.setattr(routing, "_routers", lambda model: [])
    with suppress(NumericalError):
        measured(folder, artifact, tmp_path, **more)
    given, own = noises
    assert 0 < given < own / 2


def shift_experts(model: Any) -> None:
    """Of one block, each to the next."""
    experts = model.model.layers[1].mlp.experts
    product = experts.forward.args[1]
    experts.forward = partial(experts.forward.func, experts, lambda p, e, x, tokens: product(p, (e + 1) % 6, x, tokens))


def double_expert(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    product = experts.forward.args[1]
    experts.forward = partial(experts.forward.func, experts, lambda p, e, x, t: product(p, e, x, t) * (2 if e < 3 and "down" in p else 1))


def scale_values(model: Any) -> None:
    """As a kernel with wrong scales does, before the first router."""
    linear = model.model.layers[0].self_attn.v_proj
    forward = linear.forward
    linear.forward = lambda x: 1.5 * forward(x)


def turn_router(model: Any) -> None:
    """By 0.15 of its norm: the experts are still those of the other model."""
    with torch.no_grad():
        weight = model.model.layers[0].mlp.gate.weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weight += 0.15 * weight.float().std() * noise


@pytest.mark.parametrize("wrong", [shift_experts, double_expert, scale_values, turn_router])
def test_a_wrong_product_is_not_timed(
    wrong: Callable[[Any], None], folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*given: Any) -> Any:
        model, packed = rebuild_packed(*given)
        wrong(model)
        return model, packed

    monkeypatch.setattr(measure, "rebuild_packed", built)
    monkeypatch.setattr(measure, "_repeat", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(NumericalError, match="with packed weights differ from the simulated ones by"):
        measured(folder, artifact, tmp_path)


def test_given_choices_are_the_model_s_own_where_they_agree(folder: Path, tmp_path: Path) -> None:
    """Bit for bit, and those of another model where not: it then weighs them by its own scores."""
    model: Any = load_model(context(folder, tmp_path), MODEL)
    tokens = torch.arange(2, 34)[None]
    choices, seen = Choices(), list[tuple[Tensor, Tensor]]()

    def run() -> Tensor:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    with choices.recorded(model):
        want = run()
    with choices.replayed(model):
        assert torch.equal(run(), want)
    assert (choices.given, choices.other, choices.distance) == (2 * 32, 0, 0.0)
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        gate.weight.neg_()
    with choices.replayed(model):
        hook = gate.register_forward_hook(lambda module, args, out: seen.append(out[1:]))
        run()
        hook.remove()
    assert 0 < choices.other <= 32
    assert choices.distance == pytest.approx(2 / 2**0.5, rel=0.3)  # of one router of two
    (weights, experts), recorded = seen[0], choices._recorded["model.layers.1.mlp.gate"][0]
    assert torch.equal(experts.sort(-1).values, recorded[1].sort(-1).values)
    scores = torch.softmax(-recorded[0].float(), -1).gather(-1, experts)
    torch.testing.assert_close(weights.float(), scores / scores.sum(-1, keepdim=True), rtol=2**-7, atol=0)
    assert not gate._forward_hooks


def test_a_captured_step_is_compared_with_its_own_choices(
    folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no hooks."""
    compared: list[Tensor] = []
    monkeypatch.setattr(generation, "has_graphs", lambda device: True)
    monkeypatch.setattr(measure, "_fastest", lambda decoder, model, prompt, found, *_: compared.append(found.logits) or decoder)
    measured(folder, artifact, tmp_path)
    model, _ = rebuild_packed(context(folder, tmp_path), MODEL, artifact, "auto", None, (1, 32))
    prompt, given = measure._tokens(model, SPEC.workload, torch.device("cpu"))
    assert torch.equal(compared[0], generation.generate(generation.Eager(model), prompt, 32, given).logits)
