"""Rotated models compute what the original ones do, statistics carry over, and what cannot be rotated is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.activation import fake_quantize_kv
from quant.methods.base import Linear, Rotation, RotationLoss
from quant.methods.learned_rotation import LearnedRotation
from quant.methods.quarot import Quarot
from quant.scheme import KVScheme
from quant.statistics import Statistics
from tests.tiny_models import build, config_of, save_tokenizer
from tests.workers.stage_runs import W4, calibrated, commit, context, quantize_spec, quantized, tiny_context, with_calibration
from workers.blocks import tap_inputs
from workers.capture import BlockStatistics
from workers.errors import InputError, UnsupportedModel
from workers.export.dense import write
from workers.export.report import ExportError
from workers.rebuild import attach_runtime, load_model, rebuild
from workers.recipe import Recipe
from workers.rotatable import rotatable
from workers.rotate import Rotator, model_shape, sites_of
from workers.specs import ModelSpec, QuantizeSpec
from workers.steps import key_rotation, set_rms_norm
from workers.stream import BlockModel, open_blocks

TOKENS = torch.arange(2, 38).view(3, 12)
DOUBLE = ModelSpec("model", "float64")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_mha": {},
    "mistral": {},
    "qwen2": {},
    "opt": {},
    "llama wide heads": {"head_dim": 12},
    "opt without biases": {"enable_bias": False},
    "opt plain norms": {"layer_norm_elementwise_affine": False},
}


def saved(name: str, folder: Path) -> Path:
    family, _, _ = name.partition(" ")
    build(family, **MODELS[name]).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    return folder / "model"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@torch.no_grad()
def loaded(ctx: Any, spec: ModelSpec = DOUBLE) -> BlockModel:
    """With RMS norms in float64: the library computes them in float32 whatever the model's type."""
    opened = open_blocks(ctx, spec)
    for i in range(opened.structure.count):
        opened.load(i)
    for module in opened.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight = module.weight.clone()
            set_rms_norm(module, module.variance_epsilon)
            module.weight.copy_(weight)
    return opened


def rotated(ctx: Any, method: Quarot | LearnedRotation, spec: ModelSpec = DOUBLE, loss: RotationLoss | None = None) -> Rotator:
    opened = open_blocks(ctx, spec)
    sites = sites_of(opened)
    rotation = method.rotation(model_shape(sites, opened.structure.count), Linear(seed=3).generator(), loss)
    rotator = Rotator(opened, sites, rotation, method.maps)
    rotator.install()
    for i in range(opened.structure.count):
        opened.load(i)
    return rotator


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_model_has_the_logits_of_the_original(name: str, online: bool, tmp_path: Path) -> None:
    ctx = context(saved(name, tmp_path), tmp_path)
    want = logits(loaded(ctx).model)
    rotator = rotated(ctx, Quarot(online=online))
    got = logits(rotator.model.model)
    assert float((got - want).abs().max()) < 1e-10 * float(want.abs().max())
    weight = loaded(ctx).blocks[0].get_submodule(rotator.sites.down).weight
    assert float((rotator.model.blocks[0].get_submodule(rotator.sites.down).weight - weight).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_learned_rotation_keeps_the_logits_after_its_steps(name: str, tmp_path: Path) -> None:
    """Steps away from a Hadamard matrix, of the residual stream and of every head's values."""
    ctx = context(saved(name, tmp_path), tmp_path)
    want = logits(loaded(ctx).model)
    seen: list[Rotation] = []

    def loss(rotation: Rotation, i: int) -> Tensor:
        seen.append(rotation)
        return rotation.residual[0, 0] + sum(v[0, 0] for v in rotation.values)

    rotator = rotated(ctx, LearnedRotation(steps=3, checked=1, check_every=1), loss=loss)
    assert rotator.rotation.details["best"] > 0
    for learned, start in zip((rotator.rotation.residual, *rotator.rotation.values), (seen[0].residual, *seen[0].values), strict=True):
        assert float((learned - start).abs().max()) > 1e-2
    got = logits(rotator.model.model)
    assert float((got - want).abs().max()) < 1e-10 * float(want.abs().max())


@pytest.mark.parametrize("name", ["llama", "llama wide heads", "opt"])
def test_a_rotated_model_is_rebuilt_from_its_recipe(name: str, tmp_path: Path) -> None:
    """No linear is quantized: what remains is float64 arithmetic, but for the library's own norms."""
    ctx = context(saved(name, tmp_path), tmp_path)
    want = logits(loaded(ctx).model)
    spec = QuantizeSpec(DOUBLE, quantize_spec("rtn", "quarot", pattern="none").rules)
    artifact, summary = quantized(ctx, tmp_path / "q", spec, {})
    assert summary["n_linears"] == 0
    model = rebuild(ctx, DOUBLE, artifact)
    assert float((logits(model) - want).abs().max()) < 1e-10 * float(want.abs().max())
    handle = attach_runtime(model, artifact, None, KVScheme(8))
    assert 0 < float((logits(model) - want).abs().max()) < 0.5 * float(want.abs().max())
    handle.remove()


def inputs_of(model: BlockModel, tokens: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    names = [model.structure.path(b, s.linears[0]) for b in range(model.structure.count) for s in model.structure.sites]
    taps = tap_inputs(model.model, names, lambda name, x, _: found.setdefault(name, x))
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    taps.remove()
    return {n: x.reshape(-1, x.shape[-1]) for n, x in found.items()}


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "llama wide heads"])
def test_mapped_hessians_are_those_of_the_rotated_model(name: str, online: bool, tmp_path: Path) -> None:
    ctx = context(saved(name, tmp_path), tmp_path)
    original = loaded(ctx)
    rotator = rotated(ctx, Quarot(online=online))
    before, after = inputs_of(original, TOKENS), inputs_of(rotator.model, TOKENS)
    for b in range(2):
        for site in original.structure.sites:
            name = site.linears[0]
            x, y = before[original.structure.path(b, name)], after[original.structure.path(b, name)]
            found = rotator.mapped(b, BlockStatistics({name: Statistics(hessian=x.T @ x, samples=x[None])}, {name: len(x)})).sites[name]
            assert found.hessian is not None
            assert found.samples is not None
            torch.testing.assert_close(found.hessian, y.T @ y, rtol=0, atol=1e-10 * float((y.T @ y).abs().max()))
            torch.testing.assert_close(found.samples[0], y, rtol=0, atol=1e-10 * float(y.abs().max()))


def test_what_does_not_carry_over_is_collected_in_the_stage_and_said(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian", "absmax")
    _, mapped = quantized(ctx, tmp_path / "a", quantize_spec("gptq", "quarot"), inputs)
    again = with_calibration(quantize_spec("gptq", "quarot", "smoothquant"))
    ctx.notes.clear()
    quantized(ctx, tmp_path / "b", again, inputs)
    assert "statistics of the rotated model were collected in this stage: absmax cannot be had from the unrotated model's" in ctx.notes
    assert mapped["working_set"]["declared"] == "block"
    assert 0 < mapped["output_error"] < 0.1


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_opt_needs_text_and_llama_does_not(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian")
    spec = quantize_spec("gptq", "quarot")
    if family == "llama":
        quantized(ctx, tmp_path / "q", spec, inputs)
        return
    with pytest.raises(InputError, match="LayerNorms have biases, which the statistics of their outputs contain; the stage feeds text"):
        quantized(ctx, tmp_path / "q", spec, inputs)


def test_a_zero_in_a_norm_hides_what_statistics_would_need(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 0
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    ctx = context(tmp_path / "model", tmp_path)
    with pytest.raises(InputError, match=r"layers\.1\.input_layernorm has 1 zeros in its scale.*use propagation=quantized"):
        quantized(ctx, tmp_path / "q", quantize_spec("gptq", "quarot"), calibrated(ctx, tmp_path, "hessian"))


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gemma", {}, "embeddings are scaled"),
        ("mixtral", {}, "router reads the stream"),
        ("gpt2", {}, "fused and stored transposed"),
        ("opt", {"do_layer_norm_before": False}, "norms come after the residual sum"),
        ("opt", {"word_embed_proj_dim": 16}, "another width"),
    ],
)
def test_models_that_cannot_be_rotated_are_refused_with_the_reason(family: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        rotatable(json.loads(config_of(family, **changes).to_json_string()))


def test_a_rotation_comes_first_and_is_the_same_for_all_linears(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    with pytest.raises(InputError, match="quarot rewrites the whole model: it must be the first transform; got smoothquant, quarot"):
        quantized(ctx, tmp_path / "a", quantize_spec("rtn", "smoothquant", "quarot"), {})
    both = QuantizeSpec(ModelSpec("model"), (*quantize_spec().rules, *quantize_spec("rtn", "quarot", pattern="*.q_proj").rules))
    with pytest.raises(InputError, match="must be the same in all rules; got none, quarot"):
        quantized(ctx, tmp_path / "b", both, {})


def test_a_rotated_model_has_no_place_in_a_checkpoint_of_its_family(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "quarot"), {})
    with pytest.raises(ExportError, match="the recipe has untie_head"):
        write(artifact, Path(ctx.models["model"].path), tmp_path)
    # Nor has a norm that is made one of a kind.
    recipe = Recipe(artifact)
    recipe.operations = [op for op in recipe.operations if op["op"] == "set_norm"][-1:]
    assert recipe.changes_the_model() == "set_norm"
    del recipe.operations[0]["kind"]
    assert recipe.changes_the_model() is None


def test_keys_are_mixed_while_they_are_quantized(tmp_path: Path) -> None:
    """Reference: q M and Q(k M) by hand, with the scores of one attention head."""
    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "quarot", weight=W4), {})
    model: Any = rebuild(ctx, ModelSpec("model"), artifact)
    attention = model.model.layers[0].self_attn
    assert key_rotation(attention) == 8
    seen: dict[str, Tensor] = {}

    class Keys:
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            seen["got"] = keys
            return keys, values

        def get_seq_length(self, *args: Any) -> int:
            return 0

    plain: dict[str, Tensor] = {}
    hook = attention.k_proj.register_forward_hook(lambda _m, _a, out: plain.update(k=out))
    scheme = KVScheme(4)
    handle = attach_runtime(model, None, None, scheme)
    hidden = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, zero = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
        attention(hidden, position_embeddings=(one, zero), attention_mask=None, past_key_values=Keys())
    handle.remove()
    hook.remove()
    m = Quarot().rotation(model_shape(rotatable(model.config.to_dict()), 2), torch.Generator()).values[0].float()
    keys = plain["k"].view(1, 1, 2, 8).transpose(1, 2)
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(q @ seen["got"].mT, (q @ m) @ fake_quantize_kv(keys @ m, scheme).mT, rtol=1e-5, atol=1e-5)
    assert float((seen["got"] - fake_quantize_kv(keys, scheme)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "step", [{"op": "gather", "index": "i", "scale": "s"}, {"op": "scale", "scale": "s"}, {"op": "rotation", "matrix": "m"}]
)
def test_steps_are_done_to_the_input_in_every_forward_pass(step: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", pattern="*.0.mlp.down_proj"), {})
    payload, g = artifact / "payload", torch.Generator().manual_seed(0)
    tensors = load_file(payload / "tensors_0000.safetensors")
    tensors |= {"i": torch.randperm(48, generator=g), "s": torch.rand(48, generator=g), "m": torch.randn(48, 48, generator=g)}
    save_file(tensors, payload / "tensors_0000.safetensors")
    recipe = json.loads((payload / "recipe.json").read_text())
    op = next(o for o in recipe["operations"] if o["op"] == "replace_linear")
    plain: Any = rebuild(ctx, ModelSpec("model"), commit(artifact))
    op["input"] = [step]
    (payload / "recipe.json").write_text(json.dumps(recipe))
    model: Any = rebuild(ctx, ModelSpec("model"), commit(artifact))
    x = torch.randn(2, 3, 48, generator=g)
    changed = {"gather": x[..., tensors["i"]] * tensors["s"], "scale": x * tensors["s"], "rotation": x @ tensors["m"]}[step["op"]]
    with torch.no_grad():
        assert torch.equal(model.model.layers[0].mlp.down_proj(x), plain.model.layers[0].mlp.down_proj(changed))
    op["input"] = [{"op": "activation", "low": -1.0, "high": 1.0}, step]
    (payload / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="activation must come last"):
        rebuild(ctx, ModelSpec("model"), commit(artifact))


def test_a_step_on_an_expert_is_refused(tmp_path: Path) -> None:
    ctx = tiny_context("mixtral", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", pattern="*.0.mlp.experts.down_proj.1"), {})
    path = artifact / "payload" / "recipe.json"
    recipe = json.loads(path.read_text())
    next(o for o in recipe["operations"] if o["op"] == "replace_linear")["input"] = [{"op": "hadamard", "size": 48, "block": 48}]
    path.write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="one of several experts"):
        rebuild(ctx, ModelSpec("model"), commit(artifact))


def test_loading_the_unrotated_model_afterwards_is_not_changed(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    before = logits(load_model(ctx, ModelSpec("model")))
    rotated(ctx, Quarot(), ModelSpec("model"))
    assert torch.equal(logits(load_model(ctx, ModelSpec("model"))), before)
