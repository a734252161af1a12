"""What quantize writes is what was asked for, equals slow references, and says what it did."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant import factors, methods
from quant.methods.gptq import Gptq
from quant.scheme import ActivationScheme, Granularity, WeightScheme
from quant.statistics import Statistics
from tests.tiny_models import EXPERTS, FAMILIES, tiny_model
from tests.workers.stage_runs import (
    W4,
    W4G16,
    calibrated,
    calibration_text,
    commit,
    context,
    model_with_a_dead_expert,
    quantize_spec,
    quantized,
    tiny_context,
)
from workers import families, feeding
from workers.blocks import linear_view
from workers.errors import InputError
from workers.rebuild import rebuild
from workers.rounding_errors import in_quadratic_form
from workers.specs import Component, MethodSpec, ModelSpec, QuantizeSpec, Rule

TOKENS = torch.arange(2, 38).view(3, 12)
MODEL = ModelSpec("model")
STATIC = ActivationScheme(8, granularity=Granularity.TENSOR, dynamic=False)


def original(family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(family), experts_implementation=EXPERTS.get(family)).eval()


def rows_of(artifact: Path) -> dict[str, dict[str, Any]]:
    return {r["module"]: r for r in pq.read_table(artifact / "payload" / "layers.parquet").to_pylist()}


# --- coverage and dense equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rtn_replaces_exactly_the_linears_by_their_rounded_weights(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    artifact, summary = quantized(ctx, tmp_path / "q", quantize_spec(weight=W4G16), {})
    shapes = families.linear_shapes(json.loads((tiny_model(family) / "config.json").read_text()))
    expected = original(family)
    rtn = methods.rounding("rtn", {}, version=1)
    for shape in shapes:
        view = linear_view(expected, shape.name)
        view.write(rtn.quantize(view.weight(), Statistics(), W4G16).tensor.dequantize())
    rebuilt = rebuild(ctx, MODEL, artifact)
    want = dict(expected.named_parameters())
    assert all(torch.equal(p, want[n]) for n, p in rebuilt.named_parameters())
    with torch.no_grad():
        assert torch.equal(rebuilt(TOKENS, use_cache=False).logits, expected(TOKENS, use_cache=False).logits)
    assert set(rows_of(artifact)) == {s.name for s in shapes}
    assert summary["coverage"] == {"asked": len(shapes), "quantized": len(shapes), "kept": []}


def test_the_last_rule_that_names_a_linear_decides_and_the_rest_is_kept(tmp_path: Path) -> None:
    rtn = MethodSpec(Component("rtn", 1))
    rules = (Rule("*.mlp.*", rtn, W4), Rule("model.layers.1.*.down_proj", rtn, WeightScheme(8)))
    ctx = tiny_context("llama", tmp_path)
    artifact, summary = quantized(ctx, tmp_path / "q", QuantizeSpec(MODEL, rules), {})
    bits = {n: r["bits_nominal"] for n, r in rows_of(artifact).items()}
    assert bits["model.layers.0.mlp.down_proj"] == 4
    assert bits["model.layers.1.mlp.down_proj"] == 8
    assert len(bits) == 6
    kept = {k["module"]: k["reason"] for k in summary["coverage"]["kept"]}
    assert kept == {f"model.layers.{b}.self_attn.{p}_proj": "no rule names it" for b in (0, 1) for p in "qkvo"}
    assert summary["n_linears"] == 6
    rebuilt = rebuild(ctx, MODEL, artifact)
    assert torch.equal(rebuilt.model.layers[0].self_attn.q_proj.weight, original("llama").model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_bytes_and_bits_count_what_lies_in_the_files(family: str, tmp_path: Path) -> None:
    artifact, summary = quantized(tiny_context(family, tmp_path), tmp_path / "q", quantize_spec(weight=W4G16), {})
    payload = [t for f in (artifact / "payload").glob("*.safetensors") for t in load_file(f).values()]
    stored = sum(t.numel() * t.element_size() for t in payload)
    shapes = families.linear_shapes(json.loads((tiny_model(family) / "config.json").read_text()))
    weights = sum(s.rows * s.cols for s in shapes)
    checkpoint = sum(t.numel() * t.element_size() for t in load_file(tiny_model(family) / "model.safetensors").values())
    assert summary["bits_stored"] == pytest.approx(8 * stored / weights)
    assert summary["model_bytes"] == checkpoint - 4 * weights + stored
    assert summary["bits_nominal"] == 4


# --- errors against brute force -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "transforms"),
    [("llama_mha", ()), ("llama_mha", ("awq",)), ("gemma", ("smoothquant",)), ("gpt2", ("smoothquant",))],
)
def test_errors_are_those_of_the_function_the_linear_computes(family: str, transforms: tuple[str, ...], tmp_path: Path) -> None:
    """First block: same embeddings in both models, so the outputs of its first linear show weight, scale and norm together."""
    ctx = tiny_context(family, tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian", "absmax", "absmean", "samples")
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("gptq", *transforms), inputs)
    shape = families.linear_shapes(json.loads((tiny_model(family) / "config.json").read_text()))[0]
    tokens = calibration_text(ctx, family)
    outputs = []
    for model in (original(family), rebuild(ctx, MODEL, artifact)):
        module = linear_view(model, shape.name).module
        bias = module.bias if module.bias is not None else 0.0
        module.register_forward_hook(lambda _m, _a, out, bias=bias: outputs.append((out - bias).double()))
        with torch.no_grad():
            model(tokens, use_cache=False)
    want = float(((outputs[1] - outputs[0]) ** 2).sum() / (outputs[0] ** 2).sum())
    assert rows_of(artifact)[shape.name]["output_error"] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("k", [1, 7, 8, 61])
def test_a_quadratic_form_needs_one_triangle(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    e, x = (torch.randn(5, k, generator=g, dtype=torch.float64) for _ in range(2))
    h = x.T @ x
    assert float(in_quadratic_form(e, h)) == pytest.approx(float((e @ h @ e.T).trace()), rel=1e-12)


def test_weight_error_is_relative_to_the_original_weight(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    artifact, summary = quantized(ctx, tmp_path / "q", quantize_spec(), {})
    a, b = original("llama"), rebuild(ctx, MODEL, artifact)
    errors = []
    for name, row in rows_of(artifact).items():
        w, q = linear_view(a, name).weight(), linear_view(b, name).weight()
        errors.append(float((q - w).norm() / w.norm()))
        assert row["weight_error"] == pytest.approx(errors[-1], rel=1e-5)
        assert row["output_error"] is None
    assert summary["weight_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)


# --- propagation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequentialGptq(Gptq):
    true_sequential: bool = True


@pytest.mark.parametrize("rounding", [Gptq(), SequentialGptq()], ids=["at_once", "true_sequential"])
@pytest.mark.parametrize("family", ["llama", "falcon_old"])
def test_quantized_propagation_equals_the_slow_loop(family: str, rounding: Gptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the whole model on all text again for every group of linears, plain hooks, in GPTQ's order."""
    monkeypatch.setattr(methods, "rounding_or_tuner", lambda name, params, version: rounding, raising=False)
    ctx = tiny_context(family, tmp_path)
    spec = quantize_spec("gptq", propagation="quantized")
    artifact, _ = quantized(ctx, tmp_path / "q", spec, {})
    got = rebuild(ctx, MODEL, artifact)

    model, tokens = original(family), calibration_text(ctx, family)
    shapes = families.linear_shapes(json.loads((tiny_model(family) / "config.json").read_text()))
    groups: dict[Any, list[str]] = {}
    for s in shapes:
        groups.setdefault((s.block, s.site) if isinstance(rounding, SequentialGptq) else s.block, []).append(s.name)
    for names in groups.values():
        seen: dict[str, Tensor] = {}
        hooks = [
            linear_view(model, n).module.register_forward_pre_hook(
                lambda _m, args, n=n, seen=seen: seen.update({n: args[0].flatten(0, -2)})
            )
            for n in names
        ]
        with torch.no_grad():
            model(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        for n in names:
            view, x = linear_view(model, n), seen[n]
            made = rounding.quantize(view.weight(), Statistics(hessian=2 / len(tokens) * x.T @ x), W4)
            view.write(made.tensor.dequantize())
    # Hessians differ in the last bits (batches), which may move a few roundings by one step and what follows from them.
    for s in shapes:
        a, b = linear_view(got, s.name).weight(), linear_view(model, s.name).weight()
        assert float((a - b).norm() / b.norm()) < 0.02, s.name


@pytest.mark.parametrize("rounding", ["gptq", "claq", "spqr", "slim_llm"])
def test_linears_that_read_one_input_share_a_factor(rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, *(("hessian", "samples") if rounding == "slim_llm" else ("hessian",)))
    weight = WeightScheme(2, granularity=Granularity.GROUP, group_size=8) if rounding in ("spqr", "slim_llm") else WeightScheme(2)
    made: list[int] = []
    triangle = factors._triangle
    monkeypatch.setattr(factors, "_triangle", lambda h: made.append(len(h)) or triangle(h))
    quantized(ctx, tmp_path / "q", quantize_spec(rounding, weight=weight), inputs)
    each = 2 if rounding == "slim_llm" else 1  # the bits are chosen with another damping
    blocks = original("llama").config.num_hidden_layers
    assert len(made) == each * 4 * blocks, "q, k and v; o; gate and up; down"


def test_propagation_matters_and_agrees_on_the_first_block(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian")
    first = rebuild(ctx, MODEL, quantized(ctx, tmp_path / "o", quantize_spec("gptq"), inputs)[0])
    second = rebuild(ctx, MODEL, quantized(ctx, tmp_path / "p", quantize_spec("gptq", propagation="quantized"), {})[0])
    same = [torch.equal(p, q) for p, q in zip(first.model.layers[0].parameters(), second.model.layers[0].parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.model.layers[1].mlp.down_proj.weight, second.model.layers[1].mlp.down_proj.weight)


def test_text_passes_every_quantized_block_but_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = tiny_context("llama", tmp_path)
    passed: list[torch.nn.Module] = []
    run = feeding.run_block
    monkeypatch.setattr(feeding, "run_block", lambda block, *rest: passed.append(block) or run(block, *rest))
    quantized(ctx, tmp_path / "q", quantize_spec("gptq", propagation="quantized"), {})
    assert len(passed) == original("llama").config.num_hidden_layers - 1, "nobody reads what the last one puts out"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_static_ranges_are_those_of_the_final_model(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmax")
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "smoothquant", activation=STATIC), inputs)
    steps = {
        op["module"]: op["input"]
        for op in json.loads((artifact / "payload" / "recipe.json").read_text())["operations"]
        if op["op"] == "replace_linear"
    }
    model = rebuild(ctx, MODEL, artifact)
    seen: dict[str, Tensor] = {}
    names = [n for n in steps if "experts" not in n]
    for n in names:
        linear_view(model, n).module.register_forward_pre_hook(lambda _m, args, n=n: seen.update({n: args[0]}))
    with torch.no_grad():
        model(calibration_text(ctx, family), use_cache=False)
    for n in names:
        (step,) = steps[n]
        assert step["op"] == "activation"
        assert step["low"] == pytest.approx(float(seen[n].min()), rel=1e-4)
        assert step["high"] == pytest.approx(float(seen[n].max()), rel=1e-4)
    assert all(len(s) == 1 and math.isfinite(s[0]["low"]) for s in steps.values())


# --- transforms -----------------------------------------------------------------------------------------------------


def test_groups_left_alone_are_named_with_the_reason(tmp_path: Path) -> None:
    ctx = tiny_context("bloom", tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmean", "samples")
    _, summary = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "awq"), inputs)
    assert f"awq left group down alone in 2 blocks: {families.NONLINEAR}" in ctx.notes
    assert summary["flags"] == []


def test_a_router_is_scaled_and_never_quantized(tmp_path: Path) -> None:
    ctx = tiny_context("mixtral", tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmax")
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "smoothquant"), inputs)
    before, after = original("mixtral"), rebuild(ctx, MODEL, artifact)
    for b in (0, 1):
        old, new = before.model.layers[b], after.model.layers[b]
        scale = old.post_attention_layernorm.weight / new.post_attention_layernorm.weight
        torch.testing.assert_close(new.mlp.gate.weight, old.mlp.gate.weight * scale, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(scale, torch.ones_like(scale))


def test_consumers_of_different_methods_share_no_scale(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "absmax")
    smooth = MethodSpec(Component("rtn", 1), (Component("smoothquant", 1),))
    rules = (Rule("*", smooth, W4), Rule("*.v_proj", MethodSpec(Component("rtn", 1)), W4))
    artifact, _ = quantized(ctx, tmp_path / "q", QuantizeSpec(MODEL, rules), inputs)
    after, before = rebuild(ctx, MODEL, artifact), original("llama")
    assert torch.equal(after.model.layers[0].input_layernorm.weight, before.model.layers[0].input_layernorm.weight)
    assert not torch.equal(after.model.layers[0].post_attention_layernorm.weight, before.model.layers[0].post_attention_layernorm.weight)
    assert any("quantized by different methods" in n for n in ctx.notes)


def test_an_unreached_expert_is_rounded_not_zeroed(tmp_path: Path) -> None:
    folder = model_with_a_dead_expert(tmp_path / "m")
    ctx = context(folder, tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian", "absmean", "samples")
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("gptq", "awq", activation=None), inputs)
    dead = rows_of(artifact)["model.layers.1.mlp.experts.down_proj.2"]
    assert 0 < dead["weight_error"] < 0.2
    assert dead["output_error"] is None
    assert "no calibration token reached it: rounded with an identity Hessian" in dead["notes"]
    assert "always 0" not in dead["notes"]
    assert any("down.2 alone" in n and "no calibration token" in n for n in ctx.notes)
    artifact, _ = quantized(ctx, tmp_path / "nearest", quantize_spec("rtn", "clip_output"), inputs)
    dead = rows_of(artifact)["model.layers.1.mlp.experts.down_proj.2"]
    assert dead["notes"] == "clip_output: no calibration token reached it", "there is a Hessian, but nothing rounds by it"


@pytest.mark.parametrize("rounding", ["gptq", "squeezellm", "rtn"])
def test_hessians_of_too_few_tokens_are_flagged(rounding: str, tmp_path: Path) -> None:
    """Experts see some of the tokens; the others' inputs are fewer than those. Only what factors a Hessian suffers."""
    ctx = tiny_context("mixtral", tmp_path)
    inputs = calibrated(ctx, tmp_path / "c", "hessian")
    index = json.loads((inputs["hessian"] / "payload" / "sites.json").read_text())
    sites = {name: site for block in index["blocks"] for name, site in block["sites"].items()}
    few = {linear for linear, first in index["linears"].items() if 0 < sites[first]["tokens"] < sites[first]["cols"]}
    assert few
    assert all(".experts." in name for name in few)
    wanted = {} if rounding == "rtn" else inputs
    _, summary = quantized(ctx, tmp_path / "q", quantize_spec(rounding), wanted)
    words = f"{len(few)} of {summary['n_linears']} linears saw fewer calibration tokens than they have inputs"
    assert [flag.partition(":")[0] for flag in summary["flags"]] == ([words] if rounding == "gptq" else [])


def test_static_ranges_of_an_expert_that_no_token_reaches_are_noted(tmp_path: Path) -> None:
    ctx = context(model_with_a_dead_expert(tmp_path / "m"), tmp_path)
    quantized(ctx, tmp_path / "q", quantize_spec(activation=STATIC), {})
    said = "no calibration token reached model.layers.1.mlp.experts.down_proj.2; its static range is that of its siblings"
    assert said in ctx.notes


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_is_refused_before_any_work(tmp_path: Path) -> None:
    scheme = WeightScheme(4, granularity=Granularity.GROUP, group_size=20)
    says = r"group_size=20 does not divide the 32 inputs of model\.layers\.0\.self_attn\.q_proj; divisors are 8, 16, 32"
    with pytest.raises(InputError, match=says):
        quantized(tiny_context("llama", tmp_path), tmp_path / "q", quantize_spec(weight=scheme), {})
    assert list((tmp_path / "q" / "payload").iterdir()) == []


def test_groups_along_hqqs_axis_0_are_of_the_whole_weight(tmp_path: Path) -> None:
    """64 divides no width of this model (32 and 48) and every weight of it; 20 divides none of both."""
    ctx, wide = tiny_context("llama", tmp_path), WeightScheme(4, granularity=Granularity.GROUP, group_size=64)
    summary = quantized(ctx, tmp_path / "q", quantize_spec("hqq", weight=wide, axis=0), {})[1]
    assert summary["coverage"]["asked"] == summary["coverage"]["quantized"]
    with pytest.raises(InputError, match="does not divide the 32 inputs"):
        quantized(ctx, tmp_path / "one", quantize_spec("hqq", weight=wide), {})
    with pytest.raises(InputError, match="q_proj: group size 20 does not divide 1024 weights, as axis=0 needs"):
        quantized(ctx, tmp_path / "other", quantize_spec("hqq", weight=replace(wide, group_size=20), axis=0), {})


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="need the statistics absmean, hessian, samples; given: none"):
        quantized(tiny_context("llama", tmp_path), tmp_path / "q", quantize_spec("gptq", "awq"), {})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (quantize_spec(propagation="sideways"), "allowed: original, quantized"),
        (replace(quantize_spec("gptq", propagation="quantized"), calibration=None), "needs a calibration"),
        (quantize_spec("rtn", colour="red"), "colour"),
        (quantize_spec("abc"), "abc"),
    ],
)
def test_specs_that_cannot_run_are_refused(spec: QuantizeSpec, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        quantized(tiny_context("llama", tmp_path), tmp_path / "q", spec, {})


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    inputs = calibrated(tiny_context("llama", tmp_path), tmp_path, "hessian")
    index = inputs["hessian"] / "payload" / "sites.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({**data, "blocks": data["blocks"][:1]}))
    with pytest.raises(InputError, match="1 blocks, not 2"):
        quantized(tiny_context("llama", tmp_path), tmp_path / "q", quantize_spec("gptq"), {"hessian": commit(inputs["hessian"])})
