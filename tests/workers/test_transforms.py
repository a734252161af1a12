"""Transforms inside the quantize stage: which weights they look at, what is said when they do nothing or too much, what they keep."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.scheme import ActivationScheme, WeightScheme
from tests.tiny_models import tiny_model
from tests.workers.stage_runs import calibrated, component, context, quantize_spec, quantized, tiny_context
from workers import families, quantize
from workers.errors import InputError, NumericalError
from workers.fold import BlockWeights
from workers.rebuild import load_model, rebuild
from workers.specs import ModelSpec
from workers.stream import open_blocks

MODEL = ModelSpec("model")


def changed_model(family: str, folder: Path, change: Callable[[str, Tensor], Tensor] = lambda _, t: t, **config: Any) -> Path:
    """A copy of the tiny model with other tensors and configuration."""
    shutil.copytree(tiny_model(family), folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    tensors = {n: change(n, t) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_smoothing_counts_the_router_among_the_readers_of_its_input(tmp_path: Path) -> None:
    """s = (absmax / widest weight of the router and of every expert)^(1/2), with a router that is wider than the experts."""
    folder = changed_model("mixtral", tmp_path / "m", lambda n, t: 5 * t if n.endswith("gate.weight") else t)
    ctx = context(folder, tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmax")
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "smoothquant"), inputs)
    before: Any = load_model(ctx, MODEL)
    after: Any = rebuild(ctx, MODEL, artifact)
    for b in (0, 1):
        old, new = before.model.layers[b], after.model.layers[b]
        peak = load_file(inputs["absmax"] / "payload" / f"block_{b:04d}.safetensors")[f"model.layers.{b}.mlp.gate"]
        router, experts = old.mlp.gate.weight.abs().amax(0), old.mlp.experts.gate_up_proj.abs().amax((0, 1))
        assert (router > experts).any()
        want = (peak / torch.maximum(router, experts)).sqrt()
        torch.testing.assert_close(old.post_attention_layernorm.weight / new.post_attention_layernorm.weight, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("before_norm", "flags"), [(True, []), (False, ["smoothquant could change nothing in this model"])])
def test_a_transform_that_scales_nothing_is_flagged(before_norm: bool, flags: list[str], tmp_path: Path) -> None:
    folder = changed_model("opt", tmp_path / "m", do_layer_norm_before=before_norm)
    ctx = context(folder, tmp_path)
    _, summary = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "smoothquant"), calibrated(ctx, tmp_path, "absmax"))
    assert summary["flags"] == flags


def test_a_fold_that_the_dtype_cannot_hold_names_the_tensor(tmp_path: Path) -> None:
    ctx = tiny_context("opt", tmp_path)
    model: Any = load_model(ctx, ModelSpec("model", "float16"))
    structure = families.structure(model.config.to_dict())
    weights = BlockWeights(model.model.decoder.layers[0], structure)
    s = torch.ones(32)
    s[3] = 1e-6
    weights.scale(structure.groups[0], s)
    with pytest.raises(NumericalError, match=r"self_attn_layer_norm\.\w+, with its scales folded in, is not finite in torch\.float16"):
        weights.write()


def test_nothing_of_a_block_stays_in_memory_once_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[BlockWeights]] = []

    def recorded(*args: Any) -> BlockWeights:
        made.append(weakref.ref(weights := BlockWeights(*args)))
        return weights

    monkeypatch.setattr(quantize, "BlockWeights", recorded)
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmean", "samples")
    (tmp_path / "q" / "payload").mkdir(parents=True)
    opened, alive = open_blocks(ctx, MODEL), []

    def done(block: int) -> None:
        gc.collect()
        alive.append([ref() is not None for ref in made])

    quantize.quantize_blocks(quantize_spec("rtn", "awq"), inputs, tmp_path / "q" / "payload", ctx, opened, done)
    assert alive == [[False], [False, False]]


def test_os_plus_shifts_where_norm_and_linears_have_biases(tmp_path: Path) -> None:
    """The middle of every channel of the unquantized inputs moves from the norm's bias into the linears' biases."""
    ctx = tiny_context("opt", tmp_path)
    inputs = calibrated(ctx, tmp_path, "minmax", "samples")
    spec = quantize_spec("rtn", "os_plus", activation=ActivationScheme(8))
    artifact, summary = quantized(ctx, tmp_path / "q", spec, inputs)
    assert summary["flags"] == []
    assert not any("os_plus (shift)" in note for note in ctx.notes)
    before: Any = load_model(ctx, MODEL)
    after: Any = rebuild(ctx, MODEL, artifact)
    for b in (0, 1):
        old, new = before.model.decoder.layers[b], after.model.decoder.layers[b]
        limits = load_file(inputs["minmax"] / "payload" / f"block_{b:04d}.safetensors")[f"model.decoder.layers.{b}.fc1"]
        z = limits.mean(0)
        s = old.final_layer_norm.weight / new.final_layer_norm.weight
        torch.testing.assert_close(new.final_layer_norm.bias, (old.final_layer_norm.bias - z) / s, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new.fc1.bias, old.fc1.bias + old.fc1.weight @ z, rtol=1e-4, atol=1e-5)
        assert float(s.detach().min()) >= 1 - 1e-6


@pytest.mark.parametrize("wide", ["gate_proj", "up_proj"])
def test_awq_searches_with_the_format_of_each_linear(wide: str, tmp_path: Path) -> None:
    """One of gate and up has 8 bits, the other 2: the scale is that of least loss of the feed-forward with just these, whichever comes
    first. Searched with 8 bits for both, it would be the other one's chance; so all candidates are computed here, in float64."""
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmean", "samples")
    spec = quantize_spec("rtn", component("awq", clip_search=False), weight=WeightScheme(2), grid="awq_asym")
    (rule,) = spec.rules
    rules = (rule, replace(rule, pattern=f"*.{wide}", weight=WeightScheme(8)))
    artifact, _ = quantized(ctx, tmp_path / "q", replace(spec, rules=rules), inputs)
    before: Any = load_model(ctx, MODEL)
    after: Any = rebuild(ctx, MODEL, artifact)

    def rounded(w: Tensor, bits: int) -> Tensor:
        low, top = w.amin(1, keepdim=True), 2**bits - 1
        step = ((w.amax(1, keepdim=True) - low).clamp(min=1e-5) / top).half().double()
        zero = (-low / step).round().clamp(0, top)
        return ((w / step).round() + zero).clamp(0, top).sub(zero) * step

    for b in (0, 1):
        old, new = before.model.layers[b], after.model.layers[b]
        name, file = f"model.layers.{b}.mlp.gate_proj", f"block_{b:04d}.safetensors"
        x = load_file(inputs["samples"] / "payload" / file)[name].double()
        size = load_file(inputs["absmean"] / "payload" / file)[name].double()
        weights = {n: getattr(old.mlp, n).weight.detach().double() for n in ("gate_proj", "up_proj", "down_proj")}

        def out(gate: Tensor, up: Tensor, x: Tensor = x, down: Tensor = weights["down_proj"]) -> Tensor:
            return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

        target, candidates, losses = out(weights["gate_proj"], weights["up_proj"]), [], []
        for i in range(20):
            s = (size ** (i / 20)).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            near = [rounded(weights[n] * s, 8 if n == wide else 2) / s for n in ("gate_proj", "up_proj")]
            candidates.append(s)
            losses.append(float((out(*near) - target).square().sum()))
        best = candidates[losses.index(min(losses))]
        found = (old.post_attention_layernorm.weight / new.post_attention_layernorm.weight).double()
        torch.testing.assert_close(found, best, rtol=1e-5, atol=0)


def test_os_plus_says_what_it_cannot_shift(tmp_path: Path) -> None:
    ctx = tiny_context("llama_mha", tmp_path)
    inputs = calibrated(ctx, tmp_path, "minmax", "samples", "hessian")
    quantized(ctx, tmp_path / "q", quantize_spec("rtn", "os_plus", activation=ActivationScheme(8)), inputs)
    assert "os_plus (shift) left group qkv alone in 2 blocks: its norm has no bias" in ctx.notes
    quantized(ctx, tmp_path / "g", quantize_spec("gptq", "os_plus", activation=ActivationScheme(8)), inputs)


def test_a_hessian_does_not_follow_a_shift(tmp_path: Path) -> None:
    ctx = tiny_context("opt", tmp_path)
    inputs = calibrated(ctx, tmp_path, "minmax", "samples", "hessian")
    with pytest.raises(InputError, match=r"os_plus shifts the input of qkv, and its Hessian cannot follow; set shifting=false"):
        quantized(ctx, tmp_path / "q", quantize_spec("gptq", "os_plus", activation=ActivationScheme(8)), inputs)
