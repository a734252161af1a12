"""A rebuilt model is the quantized one bit for bit, in another process too; run-time parts come and go."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from quant.activation import fake_quantize_activation, fake_quantize_kv
from quant.scheme import ActivationScheme, Granularity, KVScheme, WeightScheme
from tests.tiny_models import FAMILIES, tiny_model
from tests.workers.stage_runs import (
    W4,
    W4G16,
    calibrated,
    calibration_text,
    commit,
    component,
    quantize_spec,
    quantized,
    tiny_context,
    with_calibration,
)
from workers.artifact import CorruptArtifactError
from workers.blocks import linear_view, tap_inputs
from workers.errors import InputError
from workers.quantize import quantize_blocks
from workers.rebuild import attach_runtime, load_model, rebuild
from workers.recipe import Recipe
from workers.specs import ModelSpec, QuantizeSpec
from workers.stream import open_blocks

TOKENS = torch.arange(2, 38).view(3, 12)
MODEL = ModelSpec("model")
KINDS = ("hessian", "absmax", "absmean", "minmax", "samples")
TENSOR = ActivationScheme(8, granularity=Granularity.TENSOR)
STATIC = ActivationScheme(8, symmetric=False, granularity=Granularity.TENSOR, dynamic=False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def in_memory(spec: QuantizeSpec, inputs: dict[str, Path], folder: Path, ctx: Any) -> Tensor:
    """Logits of the model that quantize leaves when no block is given up."""
    (folder / "payload").mkdir(parents=True)
    opened = open_blocks(ctx, spec.model)
    quantize_blocks(spec, inputs, folder / "payload", ctx, opened, lambda block: None)
    commit(folder)
    return logits(opened.model)


W1 = WeightScheme(1)
W2G8 = WeightScheme(2, granularity=Granularity.GROUP, group_size=8)
SPECS = {
    "rtn": quantize_spec(weight=W4G16),
    "gptq": quantize_spec("gptq", weight=W4G16),
    "gptq_act_order": quantize_spec("gptq", weight=W4G16, act_order=True),
    "gptq_quantized": quantize_spec("gptq", weight=W4, propagation="quantized"),
    "hqq": quantize_spec("hqq", weight=W4G16),
    "hqq_strided": quantize_spec("hqq", weight=W4G16, axis=0),
    "quip": quantize_spec("quip", weight=W4),
    "quip_sharp": quantize_spec("quip_sharp", weight=W4, tune_iters=1),
    "claq": quantize_spec("claq", weight=WeightScheme(2), adaptive_bits=2.5, outlier_reservation=True),
    "claq_smoothquant": quantize_spec("claq", "smoothquant", weight=W4, kmeans_start="partition"),
    "awq": quantize_spec("rtn", "awq", weight=W4G16),
    "smoothquant_gptq": quantize_spec("gptq", "smoothquant", weight=W4),
    "billm": quantize_spec("billm", weight=W1, block_size=24),
    "billm_joint": quantize_spec("billm", weight=W1, block_size=24, variant="joint"),
    "pb_llm": quantize_spec("pb_llm", weight=W1),
    "owq": quantize_spec("gptq", weight=W4G16, outlier_columns=3, outlier_metric="owq"),
    "quik": quantize_spec("gptq", weight=W4, outlier_columns=2, outlier_metric="quik"),
    "slim_llm": quantize_spec("slim_llm", weight=W2G8),
    "slim_llm_corrected": quantize_spec("slim_llm", "awq", weight=W2G8, variant="corrected"),
    "spqr": quantize_spec("spqr", weight=W4G16),
    "spqr_awq": quantize_spec("spqr", "awq", weight=W4G16, round_zero=True),
    "squeezellm": quantize_spec("squeezellm", "smoothquant", weight=WeightScheme(3)),
    "omniquant": quantize_spec("omniquant", weight=W4G16, epochs=1),
    "omniquant_let": quantize_spec("omniquant", weight=W4, activation=ActivationScheme(6, symmetric=False), epochs=1, let=True),
    "awq_omniquant": quantize_spec("omniquant", "awq", weight=W4G16, epochs=1),
    "learned_rounding": quantize_spec("learned_rounding", weight=W4, activation=STATIC, iters=2, lr=0.3),
    "zeroquant": quantize_spec("zeroquant", weight=W4G16, activation=ActivationScheme(8), iters=1, lr=1e-3),
    "slim_llm_plus": quantize_spec("slim_llm_plus", weight=W2G8, epochs=1),
    "fp8": quantize_spec(weight=WeightScheme(8, True, number="fp8_e4m3")),
    "nvfp4_gptq": quantize_spec("gptq", weight=WeightScheme(4, True, Granularity.GROUP, 16, number="nvfp4")),
    "nf4_dq_smoothquant": quantize_spec("rtn", "smoothquant", weight=WeightScheme(4, True, Granularity.GROUP, 16, number="nf4_dq")),
    "llm_int8": quantize_spec("llm_int8", weight=WeightScheme(8, True)),
    "nf4": quantize_spec("nf4", weight=WeightScheme(4, True, Granularity.GROUP, 16, number="nf4")),
    "clip_gptq": quantize_spec("gptq", "clip", "clip_output", weight=W4G16),
    "os_plus": quantize_spec("rtn", "os_plus", weight=W4, activation=ActivationScheme(8)),
    "both": quantize_spec("rtn", "smoothquant", "awq", weight=W4, activation=STATIC),
}
VIEWED = ("gptq_act_order", "gptq_quantized", "smoothquant_gptq", "omniquant", "os_plus", "both")
"""Where linears are views of other tensors the stored format does not matter: transforms, feeding and tuning do. All of them are
rebuilt in a fresh process below."""
LEARNED = component("learned_rotation", checked=1, steps=2)
ROTATED = {
    "quarot_rtn": quantize_spec("rtn", "quarot", weight=W4),
    "quarot_gptq": quantize_spec("gptq", "quarot", weight=W4),
    "quarot_quantized": quantize_spec("gptq", "quarot", weight=W4G16, propagation="quantized"),
    "quarot_omniquant": quantize_spec("omniquant", "quarot", weight=W4, epochs=1),
    "quarot_awq": quantize_spec("rtn", "quarot", "awq", weight=W4G16, feeds=True),
    "quarot_static": quantize_spec("gptq", "quarot", weight=W4, activation=STATIC),
    "learned_rotation": quantize_spec("gptq", LEARNED, weight=W4, feeds=True),
    "quarot_partly": quantize_spec("rtn", "quarot", weight=W4, pattern="*.q_proj"),
}


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt", "falcon_old"])
def test_rebuilt_logits_equal_those_in_memory(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    inputs = calibrated(ctx, tmp_path, *KINDS)
    for name in VIEWED:
        want = in_memory(SPECS[name], inputs, tmp_path / name, ctx)
        assert torch.equal(logits(rebuild(ctx, MODEL, tmp_path / name)), want), name


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rebuilt_rotated_models_equal_those_in_memory(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    inputs = calibrated(ctx, tmp_path, *KINDS)
    for name, spec in ROTATED.items():
        want = in_memory(with_calibration(spec) if family == "opt" else spec, inputs, tmp_path / name, ctx)
        assert torch.equal(logits(rebuild(ctx, MODEL, tmp_path / name)), want), name
        if name in ("quarot_static", "quarot_partly"):
            streamed = rebuild(tiny_context(family, tmp_path, streamed=True), MODEL, tmp_path / name)
            assert torch.equal(logits(streamed), want), name
            assert torch.equal(logits(streamed), want), name


A4 = ActivationScheme(4, symmetric=False)
REASSEMBLY = component("qllm_reassembly", ratio=0.4)
REASSEMBLED = {
    "qllm": quantize_spec("qllm_correction", REASSEMBLY, weight=W4, activation=A4, epochs=1, blocks=2),
    "qllm_reassembly": quantize_spec("rtn", REASSEMBLY, weight=W4, activation=A4, grid="omni"),
    "qllm_static": quantize_spec("gptq", "smoothquant", REASSEMBLY, weight=W4, activation=STATIC),
    "qllm_correction": quantize_spec("qllm_correction", weight=W4G16, epochs=1, blocks=2),
    "quarot_qllm": quantize_spec("rtn", "quarot", REASSEMBLY, weight=W4, activation=A4),
}


def test_rebuilt_reassembled_models_equal_those_in_memory(tmp_path: Path) -> None:
    ctx = tiny_context("qwen2", tmp_path)
    inputs = calibrated(ctx, tmp_path, *KINDS)
    for name, spec in REASSEMBLED.items():
        want = in_memory(spec, inputs, tmp_path / name, ctx)
        rebuilt = rebuild(ctx, MODEL, tmp_path / name)
        assert torch.equal(logits(rebuilt), want), name
        steps = [s["op"] for op in Recipe(tmp_path / name).replaced() for s in op["input"]]
        assert ("reassemble" in steps) == (name != "qllm_correction"), name
    streamed = rebuild(tiny_context("qwen2", tmp_path, streamed=True), MODEL, tmp_path / "qllm")
    assert torch.equal(logits(streamed), logits(rebuild(ctx, MODEL, tmp_path / "qllm")))


FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tests.workers.test_rebuild import MODEL, logits
from tests.workers.stage_runs import context
from workers.rebuild import rebuild
model, folder, *names = sys.argv[1:]
ctx = context(Path(model), Path(folder))
save_file({n: logits(rebuild(ctx, MODEL, Path(folder) / n)) for n in names}, Path(folder) / "fresh.safetensors")
"""


def test_rebuilt_logits_are_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    ctx = tiny_context("llama_mha", tmp_path)
    inputs = calibrated(ctx, tmp_path, *KINDS)
    # Of what the two tests above rebuild, one of each kind: they store no format of their own.
    more = {**ROTATED, **REASSEMBLED}
    alone = ("quarot_static", "learned_rotation", "qllm", "qllm_reassembly", "qllm_correction")
    specs = {**SPECS, **{name: more[name] for name in alone}}
    want = {name: in_memory(spec, inputs, tmp_path / name, ctx) for name, spec in specs.items()}
    command = [sys.executable, "-c", FRESH, str(tiny_model("llama_mha")), str(tmp_path), *specs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    fresh = load_file(tmp_path / "fresh.safetensors")
    assert all(torch.equal(fresh[n], t) for n, t in want.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models_rebuild_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    ctx = tiny_context("llama_mha", tmp_path)
    inputs = calibrated(ctx, tmp_path, *KINDS, dtype=dtype)
    base = quantize_spec("gptq", "awq", weight=W4G16)
    spec = QuantizeSpec(ModelSpec("model", dtype), base.rules)
    want = in_memory(spec, inputs, tmp_path / "q", ctx)
    assert torch.equal(logits(rebuild(ctx, spec.model, tmp_path / "q")), want)


def test_a_streamed_rebuild_equals_the_resident_one(tmp_path: Path) -> None:
    ctx = tiny_context("mixtral", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "smoothquant"), calibrated(ctx, tmp_path, "absmax"))
    resident = logits(rebuild(ctx, MODEL, artifact))
    streamed = rebuild(tiny_context("mixtral", tmp_path, streamed=True), MODEL, artifact)
    assert torch.equal(logits(streamed), resident)
    assert torch.equal(logits(streamed), resident)


# --- refused recipes ------------------------------------------------------------------------------------------------


def rewritten(tmp_path: Path, change: Any) -> Path:
    artifact, _ = quantized(tiny_context("llama", tmp_path), tmp_path / "q", quantize_spec(), {})
    path = artifact / "payload" / "recipe.json"
    recipe = json.loads(path.read_text())
    change(recipe)
    path.write_text(json.dumps(recipe))
    return artifact


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(version=99), "recipe version 99 is not 1"),
        (lambda r: r["operations"][0].update(op="teleport"), "unknown recipe operation 'teleport'"),
        (lambda r: r["operations"][0].update(input=[{"op": "warp"}]), "unknown input operation 'warp'"),
        (lambda r: r["operations"][0].update(kind="batch"), "unknown kind of norm 'batch'"),
        (lambda r: r.update(model="another"), "was quantized from model another"),
    ],
)
def test_recipes_of_another_kind_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    artifact = commit(rewritten(tmp_path, change))
    with pytest.raises(InputError, match=says):
        rebuild(tiny_context("llama", tmp_path), MODEL, artifact)


def test_a_changed_payload_is_corrupt(tmp_path: Path) -> None:
    artifact = rewritten(tmp_path, lambda r: r.update(dtype="float32 "))
    with pytest.raises(CorruptArtifactError):
        rebuild(tiny_context("llama", tmp_path), MODEL, artifact)


# --- run time -------------------------------------------------------------------------------------------------------


class QuantizingCache(DynamicCache):
    """Reference: a cache that quantizes what it is given, handed to the model from outside."""

    def __init__(self, scheme: KVScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return fake_quantize_kv(keys, self.scheme), fake_quantize_kv(values, self.scheme)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"rwkv"}))
def test_keys_and_values_are_quantized_as_a_cache_would_see_them(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_context(family, tmp_path), MODEL)
    plain = logits(model)
    scheme = KVScheme(3)
    with torch.no_grad():
        want = model(TOKENS, use_cache=True, past_key_values=QuantizingCache(scheme)).logits
    handle = attach_runtime(model, None, None, scheme)
    got = logits(model)
    handle.remove()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((got - plain).abs().max()) > 1e-2
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_gets_a_quantized_input(family: str, tmp_path: Path) -> None:
    """Reference: the input is quantized again by a hook placed after; with per-token symmetric ranges that changes nothing."""
    model = load_model(tiny_context(family, tmp_path), MODEL)
    plain = logits(model)
    scheme = ActivationScheme(4)
    handle = attach_runtime(model, None, scheme, None)
    got = logits(model)
    again = attach_runtime(model, None, scheme, None) if family != "mixtral" else handle
    torch.testing.assert_close(logits(model), got, rtol=1e-3, atol=1e-3)
    again.remove()
    handle.remove()
    assert float((got - plain).abs().max()) > 1e-2
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("part", [{"granularity": Granularity.TENSOR}, {"outlier_threshold": 2.0}], ids=["tensor", "outliers"])
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_what_is_found_per_sequence_does_not_depend_on_the_batch(family: str, part: dict[str, Any], tmp_path: Path) -> None:
    """OPT's feed-forward gets its tokens flat, and an expert those that are routed to it."""
    model = load_model(tiny_context(family, tmp_path), MODEL)
    handle = attach_runtime(model, None, ActivationScheme(4, **part), None)
    with torch.no_grad():
        together = model(TOKENS, use_cache=False).logits
        alone = torch.cat([model(TOKENS[i : i + 1], use_cache=False).logits for i in range(len(TOKENS))])
    handle.remove()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_only_quantized_linears_get_quantized_inputs(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(pattern="*.down_proj"), {})
    model = rebuild(ctx, MODEL, artifact)
    seen: dict[str, Tensor] = {}
    handle = attach_runtime(model, artifact, TENSOR, None)
    for name in ("mlp.down_proj", "mlp.up_proj"):
        module = model.model.layers[1].get_submodule(name)
        module.register_forward_pre_hook(lambda _m, args, n=name: seen.update({n: args[0]}))
    logits(model)
    handle.remove()
    values = {n: max(sequence.unique().numel() for sequence in x) for n, x in seen.items()}
    assert values["mlp.down_proj"] <= 255
    assert values["mlp.up_proj"] > 255


def inputs_of(model: Any, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    taps = tap_inputs(model, names, lambda name, x, _: seen.setdefault(name, x))
    with torch.no_grad():
        model(tokens, use_cache=False)
    taps.remove()
    return seen


@pytest.mark.parametrize("scheme", [ActivationScheme(4, symmetric=False), replace(STATIC, bits=4)], ids=["dynamic", "static"])
def test_inputs_of_columns_that_quik_keeps_stay_exact_and_count_for_no_range(scheme: ActivationScheme, tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    static = None if scheme.dynamic else scheme
    spec = quantize_spec("gptq", weight=W4, activation=static, outlier_columns=3, outlier_metric="quik")
    artifact, _ = quantized(ctx, tmp_path / "q", spec, calibrated(ctx, tmp_path, "hessian"))
    recipe, reference = Recipe(artifact), rebuild(ctx, MODEL, artifact)
    seen = inputs_of(reference, [op["module"] for op in recipe.replaced()], calibration_text(ctx, "llama").long())
    narrower = 0
    for op in recipe.replaced():
        x, kept = seen[op["module"]], recipe.stored(op).kept.tolist()  # type: ignore[attr-defined]
        rest = torch.tensor([c for c in range(x.shape[-1]) if c not in kept])
        limits = None
        if static is not None:
            limits = (op["input"][-1]["low"], op["input"][-1]["high"])
            own = x[..., rest]
            assert limits == pytest.approx((float(own.min()), float(own.max())), rel=1e-4)  # float32, in other batches
            narrower += limits[1] - limits[0] < 0.9 * float(x.max() - x.min())

        def hook(_m: Any, args: tuple[Tensor, ...], rest: Tensor = rest, limits: Any = limits) -> tuple[Tensor]:
            return (args[0].index_copy(-1, rest, fake_quantize_activation(args[0][..., rest], scheme, limits)),)

        assert len(kept) == 3
        linear_view(reference, op["module"]).module.register_forward_pre_hook(hook)
    assert static is None or narrower
    model = rebuild(ctx, MODEL, artifact)
    plain = logits(model)
    handle = attach_runtime(model, artifact, scheme, None)
    assert torch.equal(logits(model), logits(reference))
    handle.remove()
    assert torch.equal(logits(model), plain)


def test_static_ranges_come_from_the_artifact(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(activation=STATIC), {})
    operations = json.loads((artifact / "payload" / "recipe.json").read_text())["operations"]
    reference = rebuild(ctx, MODEL, artifact)
    for op in operations:
        limits = (op["input"][0]["low"], op["input"][0]["high"])
        linear_view(reference, op["module"]).module.register_forward_pre_hook(
            lambda _m, args, limits=limits: (fake_quantize_activation(args[0], STATIC, limits),)
        )
    model = rebuild(ctx, MODEL, artifact)
    handle = attach_runtime(model, artifact, STATIC, None)
    assert torch.equal(logits(model), logits(reference))
    handle.remove()


def test_static_ranges_that_were_not_calibrated_are_refused(tmp_path: Path) -> None:
    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(), {})
    with pytest.raises(InputError, match=r"q_proj has none: quantize with activation\.dynamic=false"):
        attach_runtime(rebuild(ctx, MODEL, artifact), artifact, STATIC, None)
    with pytest.raises(InputError, match="has none"):
        attach_runtime(load_model(ctx, MODEL), None, STATIC, None)


def test_experts_get_quantized_inputs(tmp_path: Path) -> None:
    """One expert chosen for every token: quantizing inputs by hooks equals quantizing them before plain linears."""
    model = load_model(tiny_context("mixtral", tmp_path), MODEL)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 32)
    index, weight = torch.full((5, 1), 2), torch.ones(5, 1)
    scheme = ActivationScheme(8)
    handle = attach_runtime(model, None, scheme, None)
    got = experts(x, index, weight)
    handle.remove()
    gate, up = (fake_quantize_activation(x, scheme) @ experts.gate_up_proj[2].T).chunk(2, -1)
    want = fake_quantize_activation(torch.nn.functional.silu(gate) * up, scheme) @ experts.down_proj[2].T
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
