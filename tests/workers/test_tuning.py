"""Tuners in the quantize stage: streams, real blocks as functions, folding, composition with transforms and roundings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.methods.equivalent import EquivalentTransform
from quant.methods.omniquant import OmniQuant
from quant.methods.tuner import TuningBlocks
from quant.scheme import ActivationScheme, WeightScheme
from tests.shared import shared_path
from tests.tiny_models import EXPERTS, FAMILIES, tiny_model
from tests.workers.stage_runs import CALIBRATION, W4G16, calibrated, calibration_text, context, quantize_spec, quantized, tiny_context
from workers.errors import InputError
from workers.fold import BlockWeights
from workers.quantize import run_quantize
from workers.rebuild import attach_runtime, rebuild
from workers.request import Location
from workers.rounding import BlockQuantizer, make_methods
from workers.specs import Component, MethodSpec, ModelSpec, QuantizeSpec, Rule, TextSpec
from workers.stream import open_blocks
from workers.tuning import BlockForward, Tuning

MODEL = ModelSpec("model")
A4 = ActivationScheme(4, symmetric=False)
TWO = WeightScheme(2)


def original(family: str, dtype: torch.dtype = torch.float32) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=dtype, experts_implementation=EXPERTS.get(family))
    return loaded.eval()


def opened(family: str, tmp_path: Path, b: int = 0) -> tuple[Tuning, TuningBlocks, BlockQuantizer, BlockForward]:
    """Block b of a float64 model, as a tuner is given it."""
    ctx = tiny_context(family, tmp_path)
    model = open_blocks(ctx, ModelSpec("model", "float64"))
    spec = quantize_spec("omniquant", weight=W4G16)
    (method,) = make_methods(spec.rules)
    tuning = Tuning(OmniQuant(), model, calibration_text(ctx, family), None, ctx)
    block = model.load(b)
    tuning.open(range(b, b + 1))
    chosen = dict.fromkeys(model.structure.linear_names(), method)
    weights = BlockWeights(block, model.structure)
    worker = BlockQuantizer(b, block, model.structure, chosen, weights, {}, {}, None, {}, set())  # type: ignore[arg-type]
    forward = BlockForward(model, range(b, b + 1), [worker])
    return tuning, tuning._blocks([worker], forward), worker, forward


@pytest.mark.parametrize("family", FAMILIES)
def test_every_equivalent_transform_keeps_the_block(family: str, tmp_path: Path) -> None:
    """In float64, at 16 bits, with random scales of both signs and random shifts, at every place at once and one by one."""
    _, blocks, _, _ = opened(family, tmp_path)
    assert torch.equal(blocks.forward({}, blocks.inputs), blocks.targets)
    chosen = [blocks.places, *((p,) for p in blocks.places)]
    for n, places in enumerate(chosen):
        let = EquivalentTransform(blocks, places, 0.5, shift=True)
        g = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for s in let.scales.values():
                s.copy_((0.5 + torch.rand(s.shape, generator=g)) * (2 * torch.randint(0, 2, s.shape, generator=g) - 1))
            for d in let.shifts.values():
                d.copy_(torch.randn(d.shape, generator=g))
            t = let.apply()
            out = blocks.forward({**{f"{k}.weight": w for k, w in t.weights.items()}, **t.parameters}, blocks.inputs)
        # The library computes Gemma's norm in float32, weight included.
        torch.testing.assert_close(out, blocks.targets, rtol=0, atol=1e-10 if family != "gemma" else 1e-4)
        if family in ("llama", "opt"):
            assert any(bool((w - blocks.linears[k].weight).abs().max() > 0.1) for k, w in t.weights.items())
    names = {p.name.rpartition(".")[2] for p in blocks.places}
    assert names >= {"llama": {"qkv", "gate_up", "scores"}, "opt": {"qkv", "output", "fc1", "scores"}}.get(family, set())


def test_an_equivalent_transform_of_all_blocks_keeps_the_logits(tmp_path: Path) -> None:
    """OPT, whose norms are computed in float64 as the rest: what it changes of one block passes through the next."""
    changed: dict[str, Tensor] = {}
    for b in (0, 1):
        _, blocks, _, _ = opened("opt", tmp_path, b)
        let = EquivalentTransform(blocks, blocks.places, 0.5, shift=True)
        with torch.no_grad():
            for i, p in enumerate(let.parameters()):
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
            let.hold()
            t = let.apply()
        changed |= {**{f"{n}.weight": w for n, w in t.weights.items()}, **t.parameters}
    model, tokens = original("opt", torch.float64), torch.arange(2, 26).view(2, 12)
    assert sum(bool((model.get_parameter(n) != p).any()) for n, p in changed.items()) > len(changed) / 2
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        for n, p in changed.items():
            model.get_parameter(n).copy_(p)
        got = model(tokens, use_cache=False).logits
    assert float((got - want).abs().max()) < 1e-10 * float(want.abs().max())


def test_gradients_of_every_place_against_finite_differences(tmp_path: Path) -> None:
    """A norm, a linear and scores. Noise on the changed weights: without it the block does not depend on scales and shifts."""
    _, blocks, _, _ = opened("opt", tmp_path)
    let = EquivalentTransform(blocks, blocks.places, 0.5, shift=True)
    g = torch.Generator().manual_seed(0)
    noise = {n: 0.1 * torch.randn(x.weight.shape, generator=g, dtype=torch.float64) for n, x in blocks.linears.items()}
    assert {p.kind for p in blocks.places} == {"norm", "linear", "scores"}

    def loss() -> Tensor:
        t = let.apply()
        changed = {**{f"{n}.weight": w + noise[n] for n, w in t.weights.items()}, **t.parameters}
        return (blocks.forward(changed, blocks.quantized[:1]) - blocks.targets[:1]).square().mean()

    loss().backward()
    for p in let.parameters():
        assert p.grad is not None
        direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                p.add_(step * direction)
                ends.append(float(loss()))
            p.add_(1e-6 * direction)
        slope = float((p.grad * direction).sum())
        assert abs(slope) > 1e-5
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_a_block_is_a_function_of_named_weights(family: str, tmp_path: Path) -> None:
    """Given weights act as if they were written; gradients reach every linear that a token reaches."""
    _, blocks, worker, forward = opened(family, tmp_path)
    changed = {f"{n}.weight": (x.weight * 1.1).requires_grad_(True) for n, x in blocks.linears.items()}
    out = forward(changed, blocks.inputs)
    out.square().mean().backward()
    reached = [n for n, w in changed.items() if w.grad is not None and bool(w.grad.any())]
    assert len(reached) == len(changed) if family != "mixtral" else len(reached) > 6
    for n, view in worker.weights.views.items():
        view.write(changed[f"{worker.path(n)}.weight"].detach())
    torch.testing.assert_close(forward({}, blocks.inputs), out.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama_mha", "opt", "mixtral"])
def test_the_streams_are_those_of_the_two_models(family: str, tmp_path: Path) -> None:
    """Reference: block outputs of the unquantized model, and of the rebuilt one with its run-time part attached."""
    ctx = tiny_context(family, tmp_path)
    spec = quantize_spec("omniquant", weight=W4G16, activation=A4, epochs=1)
    artifact, summary = quantized(ctx, tmp_path / "q", spec, {})
    tokens = calibration_text(ctx, family)
    ends = []
    for model, runtime in ((original(family), False), (rebuild(ctx, MODEL, artifact), True)):
        if runtime:
            attach_runtime(model, artifact, A4, None)
        kept: list[Tensor] = []
        blocks = model.get_submodule("model.decoder.layers" if family == "opt" else "model.layers")
        for block in blocks:
            block.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            model(tokens, use_cache=False)
        ends.append(kept)
    for b, entry in enumerate(summary["tuning"]):
        assert entry["blocks"] == [b]
        assert entry["loss"] == pytest.approx(float((ends[0][b] - ends[1][b]).square().mean()), rel=1e-3)
        assert entry["loss"] <= entry["start"]
    assert summary["working_set"]["declared"] == "block"
    assert summary["peak_memory_bytes"] > 0


@pytest.mark.parametrize("stream", ["original", "quantized"])
def test_zeroquant_learns_from_the_unquantized_block_on_what_it_reads(stream: str, tmp_path: Path) -> None:
    """Reference: blocks of the rebuilt model with its run-time part, and the original's on the same inputs."""
    family = "llama_mha"
    ctx = tiny_context(family, tmp_path)
    spec = quantize_spec("zeroquant", weight=W4G16, activation=A4, iters=3, lr=1e-3, checks=1, stream=stream)
    artifact, summary = quantized(ctx, tmp_path / "q", spec, {})
    student, teacher = rebuild(ctx, MODEL, artifact), original(family)
    attach_runtime(student, artifact, A4, None)
    fed, other = (teacher, student) if stream == "original" else (student, teacher)
    found = []

    def compare(b: int, args: Any, kwargs: Any, out: Any) -> None:
        found.append(float((first(out) - first(other.model.layers[b](*args, **kwargs))).square().mean()))

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    for b, block in enumerate(fed.model.layers):
        block.register_forward_hook(lambda _m, args, kwargs, out, b=b: compare(b, args, kwargs, out), with_kwargs=True)
    with torch.no_grad():
        fed(calibration_text(ctx, family), use_cache=False)
    assert [e["loss"] for e in summary["tuning"]] == pytest.approx(found, rel=1e-3)
    assert all(e["loss"] < e["start"] for e in summary["tuning"])


def test_zeroquant_without_distillation_stores_what_rtn_stores_on_the_symmetric_grid(tmp_path: Path) -> None:
    ctx, stored = tiny_context("llama_mha", tmp_path), []
    for name, params in (("zeroquant", {"iters": 0}), ("rtn", {"grid": "q_sym"})):
        artifact, _ = quantized(ctx, tmp_path / name, quantize_spec(name, weight=W4G16, **params), {})
        stored.append({p.name: load_file(p) for p in sorted((artifact / "payload").glob("tensors_*.safetensors"))})
    assert stored[0].keys() == stored[1].keys()
    for name, tensors in stored[0].items():
        assert tensors.keys() == stored[1][name].keys()
        assert all(torch.equal(t, stored[1][name][k]) for k, t in tensors.items())


@pytest.mark.parametrize(
    ("family", "name", "params"),
    [("llama", "omniquant", {"epochs": 1, "let": True}), ("opt", "learned_rounding", {"iters": 2, "batch_size": 2, "lr": 0.3})],
)
def test_the_same_seed_gives_the_same_bits(family: str, name: str, params: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the batches that the hints ask for."""
    runs = []
    for batch in (24, 1000):
        ctx = tiny_context(family, tmp_path, batch_tokens=batch)
        spec = replace(quantize_spec(name, weight=W4G16, activation=A4, **params), seed=3)
        artifact, _ = quantized(ctx, tmp_path / str(batch), spec, {})
        runs.append(load_file(artifact / "payload" / "tensors_0001.safetensors"))
    assert all(torch.equal(t, runs[1][n]) for n, t in runs[0].items())


def test_a_transform_before_the_tuner(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmean", "samples")
    artifact, summary = quantized(ctx, tmp_path / "q", quantize_spec("omniquant", "awq", weight=W4G16, epochs=1), inputs)
    operations = json.loads((artifact / "payload" / "recipe.json").read_text())["operations"]
    assert {op["op"] for op in operations} == {"set_norm", "replace_linear"}
    assert all(e["loss"] <= e["start"] for e in summary["tuning"])
    assert summary["weight_error"] < 0.2


@pytest.mark.parametrize("family", ["llama_mha", "opt"])
def test_learned_scales_go_together_with_a_rotation(family: str, tmp_path: Path) -> None:
    """At 8 bits, untrained: scales and shifts that changed the rotated block would show as a large loss (outputs are of size 1)."""
    ctx = tiny_context(family, tmp_path)
    eight = ActivationScheme(8, symmetric=False)
    spec = quantize_spec("omniquant", "quarot", weight=WeightScheme(8), activation=eight, epochs=0, let=True)
    artifact, summary = quantized(ctx, tmp_path / "q", spec, {})
    assert all(e["start"] < 0.02 for e in summary["tuning"])
    tokens = calibration_text(ctx, family)
    rebuilt = rebuild(ctx, MODEL, artifact)
    with torch.no_grad():
        want, got = original(family)(tokens, use_cache=False).logits, rebuilt(tokens, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 0.05


def test_rules_may_round_some_linears_and_tune_the_others(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    tuned = quantize_spec("omniquant", weight=W4G16, epochs=1)
    rules = (tuned.rules[0], Rule("*.down_proj", MethodSpec(Component("rtn", 1)), WeightScheme(8)))
    artifact, _ = quantized(ctx, tmp_path / "q", replace(tuned, rules=rules), {})
    rows = {r["module"]: r for r in pq.read_table(artifact / "payload" / "layers.parquet").to_pylist()}
    assert len(rows) == 14
    for name, row in rows.items():
        assert (row["bits_nominal"], bool(row["details"])) == ((8, False) if name.endswith("down_proj") else (4, True))


def test_folded_scales_are_taken_out_of_the_weight_error(tmp_path: Path) -> None:
    """At 8 bits the weight error is that of rounding, though norms, rows and columns have changed."""
    ctx = tiny_context("opt", tmp_path)
    spec = quantize_spec("omniquant", weight=WeightScheme(8), activation=ActivationScheme(8, symmetric=False), epochs=1, let=True)
    artifact, summary = quantized(ctx, tmp_path / "q", spec, {})
    operations = json.loads((artifact / "payload" / "recipe.json").read_text())["operations"]
    assert sum(op["op"] == "set_norm" for op in operations) == 4
    assert sum(op.get("bias") is not None for op in operations) == 2 * 5  # q, k, v, out, fc1
    assert summary["weight_error"] < 0.02


def test_what_a_stage_cannot_tune_is_refused(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    spec = quantize_spec("omniquant", weight=W4G16)
    other = replace(spec.rules[0], pattern="*.down_proj", method=MethodSpec(Component("omniquant", 1, (("epochs", 3),))))
    (tmp_path / "p").mkdir()
    with pytest.raises(InputError, match="the rules name different tuners or parameters"):
        run_quantize(replace(spec, rules=(*spec.rules, other)), {}, tmp_path / "p", ctx)
    with pytest.raises(InputError, match="omniquant feeds text: the spec needs a calibration"):
        run_quantize(replace(spec, calibration=None), {}, tmp_path / "p", ctx)


def test_static_ranges_are_noted_and_taken_at_the_end(tmp_path: Path) -> None:
    from tests.workers.test_rebuild import STATIC

    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("omniquant", weight=W4G16, activation=STATIC, epochs=1), {})
    assert "omniquant trains with dynamic activation ranges; the static ones are taken from its result" in ctx.notes
    operations = json.loads((artifact / "payload" / "recipe.json").read_text())["operations"]
    assert all(op["input"] for op in operations if op["op"] == "replace_linear")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models_are_tuned_in_float32(dtype: str, tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    base = quantize_spec("omniquant", weight=W4G16, activation=A4, epochs=1, let=True)
    _, summary = quantized(ctx, tmp_path / "q", QuantizeSpec(ModelSpec("model", dtype), base.rules, CALIBRATION, A4), {})
    assert all(e["loss"] <= e["start"] for e in summary["tuning"])


def test_learned_clipping_helps_a_real_model(tmp_path: Path) -> None:
    """2 bits per channel, where the paper gains most."""
    model = shared_path("models", "stories260K")
    ctx = replace(context(model, tmp_path), texts={"text": Location("file", str(shared_path("data", "wikitext2", "train_sample.txt")))})
    calibration = replace(CALIBRATION, text=TextSpec("text"), samples=4, sequence_length=64)
    spec = replace(quantize_spec("omniquant", weight=TWO, epochs=3, lwc_lr=0.1), calibration=calibration)
    _, summary = quantized(ctx, tmp_path / "q", spec, {})
    assert all(e["loss"] < 0.98 * e["start"] for e in summary["tuning"]), summary["tuning"]
