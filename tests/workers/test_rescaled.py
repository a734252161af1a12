"""RWKV-4 that transformers rescales for inference: its weights stay the checkpoint's here, and it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.linear import quantize_linear
from tests.tiny_models import build, save_tokenizer
from tests.workers.stage_runs import calibrated, commit, context, quantize_spec, quantized
from workers import families, measure
from workers.export.run import run as export
from workers.generation import Eager, generate
from workers.machine import cpu_model
from workers.measure import run_measure
from workers.quantize import quantize_blocks
from workers.rebuild import load_model, rebuild, rebuild_packed
from workers.recipe import Recipe
from workers.residency import Residency
from workers.specs import MeasureSpec, ModelSpec, Workload
from workers.stream import open_blocks

TOKENS = torch.arange(2, 38).view(3, 12)
MODEL = ModelSpec("model")
SPECS = {
    "rtn": quantize_spec(),
    "gptq": quantize_spec("gptq"),
    "gptq_quantized": quantize_spec("gptq", propagation="quantized"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks before the first halving, between two, and after the last; the final norm sees three. Embeddings are small, so that a norm's
    epsilon counts."""
    made = tmp_path_factory.mktemp("rwkv")
    model = build("rwkv", num_hidden_layers=7, rescale_every=2)
    with torch.no_grad():
        model.rwkv.embeddings.weight.mul_(0.1)
    model.save_pretrained(made)
    save_tokenizer(made)
    return made


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def from_pretrained(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def with_stored(folder: Path, artifact: Path) -> Any:
    """Transformers' model with the artifact's weights in place of the checkpoint's, before it is rescaled."""
    recipe, model = Recipe(artifact), from_pretrained(folder)
    assert {op["module"] for op in recipe.replaced()} == {s.name for s in families.linear_shapes(model.config.to_dict())}
    with torch.no_grad():
        for op in recipe.replaced():
            model.get_parameter(op["module"] + ".weight").copy_(recipe.stored(op).dequantize())
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("streamed", [False, True])
def test_it_computes_what_transformers_does(streamed: bool, dtype: str, folder: Path, tmp_path: Path) -> None:
    """Bit for bit."""
    theirs = from_pretrained(folder, dtype)
    before = theirs.rwkv.blocks[-1].attention.output.weight.clone()
    want = logits(theirs)
    assert not torch.equal(theirs.rwkv.blocks[-1].attention.output.weight, before), "it was not rescaled"
    assert torch.equal(logits(load_model(context(folder, tmp_path, streamed=streamed), ModelSpec("model", dtype))), want)


@pytest.mark.parametrize("name", SPECS)
def test_a_variant_is_transformers_model_with_the_stored_weights(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized in memory, rebuilt, streamed, packed, in steps and exported."""
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)
    ctx, spec = context(folder, tmp_path), SPECS[name]
    statistics = {} if name == "rtn" else calibrated(ctx, tmp_path, "hessian")
    (tmp_path / "q" / "payload").mkdir(parents=True)
    opened = open_blocks(ctx, MODEL)
    quantize_blocks(spec, statistics, tmp_path / "q" / "payload", ctx, opened, lambda block: None)
    artifact = commit(tmp_path / "q")

    want = logits(with_stored(folder, artifact))
    assert torch.equal(logits(opened.model), want)
    assert torch.equal(logits(rebuild(ctx, MODEL, artifact)), want)
    assert torch.equal(logits(rebuild(context(folder, tmp_path, streamed=True), MODEL, artifact)), want)

    workload = Workload(batch=1, prompt=6, tokens=3, threads=1)
    run_measure(MeasureSpec(MODEL, workload, cpu_model()), {"quantize": artifact}, tmp_path, ctx, Residency())  # which checks
    packed, _ = rebuild_packed(ctx, MODEL, artifact, "auto", None)
    found = generate(Eager(packed), TOKENS[:1, :9], 3, TOKENS[:1, 9:]).logits
    # A product's sum in another order passes seven blocks.
    torch.testing.assert_close(found, want[:1, 8:], rtol=1e-4, atol=1e-4)

    export("dense", artifact, folder, tmp_path / "out")
    assert torch.equal(logits(from_pretrained(tmp_path / "out")), logits(with_stored(folder, artifact).half().float()))


def test_weights_are_quantized_as_the_checkpoint_has_them(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(quantized(context(folder, tmp_path), tmp_path / "q", SPECS["rtn"], {})[0])
    checkpoint = load_file(folder / "model.safetensors")
    for op in recipe.replaced():
        alone = quantize_linear(checkpoint[op["module"] + ".weight"], method="rtn", bits=4, scale_dtype="float16")
        assert torch.equal(recipe.stored(op).dequantize(), alone.dequantize()), op["module"]
