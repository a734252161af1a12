"""The loss that rotations are learned with: that of the quantized model, differentiable; and the search inside quantize."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant.methods.base import Linear, Rotation
from quant.methods.quarot import Quarot
from quant.methods.rtn import Rtn
from quant.scheme import ActivationScheme, KVScheme, WeightScheme
from tests.workers.stage_runs import calibration_text, component, quantize_spec, quantized, tiny_context, with_calibration
from workers.errors import InputError
from workers.rebuild import attach_runtime, load_model, rebuild
from workers.rotate import model_shape, sites_of
from workers.rotation_search import Nearest, search_loss
from workers.specs import ModelSpec, QuantizeSpec
from workers.stream import open_blocks

MODEL = ModelSpec("model")
TOKENS = torch.arange(2, 38).view(3, 12)
W16A4KV4 = {"activation": ActivationScheme(4), "kv": KVScheme(4)}


def spec_with(**parts: Any) -> QuantizeSpec:
    return replace(with_calibration(quantize_spec("rtn", "learned_rotation")), **parts)


def rotation_of(ctx: Any, **params: Any) -> Rotation:
    opened = open_blocks(ctx, MODEL)
    return Quarot(**params).rotation(model_shape(sites_of(opened), opened.structure.count), Linear("quarot", 2).generator())


def nll(model: Any, i: int) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(TOKENS[i : i + 1], use_cache=False).logits[0, :-1], TOKENS[i, 1:])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_loss_without_quantization_is_the_models_own(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    loss = search_loss(spec_with(), ctx, TOKENS, lambda _: None)
    model = load_model(ctx, MODEL)
    for i in (0, 1, 4):
        torch.testing.assert_close(loss(rotation_of(ctx), i), nll(model, i % 3), rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_the_rotated_quantized_model(tmp_path: Path) -> None:
    """A code on the border of two may fall to either side, so it is compared to a per cent."""
    ctx = tiny_context("llama", tmp_path)
    rotation = rotation_of(ctx)
    loss = search_loss(spec_with(activation=ActivationScheme(8), kv=KVScheme(8)), ctx, TOKENS, lambda _: Nearest(WeightScheme(6), Rtn()))
    spec = replace(quantize_spec("rtn", "quarot", weight=WeightScheme(6)), seed=2)
    artifact, _ = quantized(ctx, tmp_path / "q", spec, {})
    model = rebuild(ctx, MODEL, artifact)
    handle = attach_runtime(model, artifact, ActivationScheme(8), KVScheme(8))
    want = nll(model, 0)
    handle.remove()
    assert float(loss(rotation, 0)) == pytest.approx(float(want), rel=0.02)


@pytest.mark.parametrize("learned", ["residual", "values"])
def test_gradients_are_those_of_finite_differences(learned: str, tmp_path: Path) -> None:
    """Without rounding; along a random direction, central differences of step h err by h² f''' / 6 and float32's 1e-7 f / h."""
    ctx = tiny_context("llama", tmp_path)
    loss = search_loss(spec_with(), ctx, TOKENS, lambda _: None)
    made = rotation_of(ctx)
    # Off the orthonormal matrices, where the loss changes at all.
    g = torch.Generator().manual_seed(0)
    matrices = {"residual": [made.residual.float() * 1.1], "values": [v.float() * 1.2 for v in made.values]}
    directions = [torch.randn(r.shape, generator=g) / r.shape[0] for r in matrices[learned]]

    def at(moved: list[Tensor]) -> Tensor:
        residual, *_ = moved if learned == "residual" else matrices["residual"]
        return loss(replace(made, residual=residual, values=tuple(moved if learned == "values" else matrices["values"])), 0)

    leaves = [r.clone().requires_grad_() for r in matrices[learned]]
    gradients = torch.autograd.grad(at(leaves), leaves)
    h = 1e-2
    with torch.no_grad():
        up, down = (float(at([r + s * h * d for r, d in zip(matrices[learned], directions, strict=True)])) for s in (1, -1))
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert abs(slope) > 2e-3
    assert slope == pytest.approx((up - down) / (2 * h), rel=0.02, abs=2e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_learned_rotations_end_no_worse_than_they_start(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    params = {"check_every": 2, "checked": 3, "lr": 0.5, "steps": 8}
    base = spec_with(**W16A4KV4, seed=1)
    rule = base.rules[0]
    method = replace(rule.method, transforms=(component("learned_rotation", **params),))
    spec = replace(base, rules=(replace(rule, method=method),))
    artifact, summary = quantized(ctx, tmp_path / "q", spec, {})
    losses = summary["rotation"]["losses"]
    assert len(losses) == 5
    assert min(losses) == losses[summary["rotation"]["best"]] <= losses[0]
    assert summary["working_set"]["declared"] == "model"
    used = {op["op"] for op in json.loads((artifact / "payload" / "recipe.json").read_text())["operations"]}
    assert "heads_hadamard" not in used
    again, _ = quantized(ctx, tmp_path / "again", spec, {})
    for file in sorted((artifact / "payload").glob("*.safetensors")):
        assert file.read_bytes() == (again / "payload" / file.name).read_bytes()


def test_the_search_rounds_weights_as_the_rule_does(tmp_path: Path) -> None:
    """Without steps the start is used, and its loss is that of the stored model. Rotated in float32 there and in float64 here, a weight on
    the border of two codes may differ: by far less than grids do."""
    ctx = tiny_context("llama", tmp_path)
    tokens = calibration_text(ctx, "llama")[:1].long()
    start = component("learned_rotation", checked=1, steps=0, weights=True)
    searched, stored = [], []
    for i, params in enumerate(({}, {"grid": "q_sym"}, {"grid": "q_sym", "mse": True})):
        spec = replace(with_calibration(quantize_spec("rtn", start, weight=WeightScheme(3), **params)), seed=1)
        artifact, summary = quantized(ctx, tmp_path / str(i), spec, {})
        searched += summary["rotation"]["losses"]
        with torch.no_grad():
            logits = rebuild(ctx, MODEL, artifact)(tokens, use_cache=False).logits
        stored.append(float(F.cross_entropy(logits[0, :-1], tokens[0, 1:])))
    apart = min(abs(a - b) for a, b in itertools.combinations(stored, 2))
    assert apart > 1e-2
    assert searched == pytest.approx(stored, abs=apart / 4)


def test_a_search_without_text_is_refused_and_an_idle_one_is_noted(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    with pytest.raises(InputError, match="learned_rotation searches on calibration text; the spec needs a calibration"):
        quantized(ctx, tmp_path / "a", quantize_spec("rtn", "learned_rotation"), {})
    params = {"checked": 1, "steps": 1}
    base = spec_with()
    method = replace(base.rules[0].method, transforms=(component("learned_rotation", **params),))
    quantized(ctx, tmp_path / "b", replace(base, rules=(replace(base.rules[0], method=method),)), {})
    assert any("nothing is quantized in the search" in n for n in ctx.notes)
    kivi = KVScheme(2, group_size=4, kind="kivi", residual_length=4)
    quantized(ctx, tmp_path / "c", replace(base, kv=kivi, rules=(replace(base.rules[0], method=method),)), {})
    assert any("the search leaves the cache of kv.kind=kivi in full precision" in n for n in ctx.notes)
