"""Every method on a GPU: the quantized model is as good as the CPU's, and is rebuilt there; and what it is measured by there.

Codes are not compared: sums in another order move a weight across the middle between two codes now and then, and then later ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.kernels import kernel
from quant.scheme import ActivationScheme, KVScheme, WeightScheme
from tests.tiny_models import build, save_tokenizer
from tests.workers.stage_runs import calibrated, context, quantize_spec, quantized, tiny_context
from tests.workers.test_alike import DTYPES, FORMATS, GROUPS, made
from tests.workers.test_matrix import MATRIX, METHODS, PARTS, TOKENS, transform
from workers.alike import TOLERANCE
from workers.context import Context
from workers.measure import run_measure
from workers.packed import ANY_ROWS, DENSE, SIMULATED
from workers.rebuild import attach_runtime, rebuild, rebuild_packed
from workers.residency import Residency
from workers.specs import MeasureSpec, ModelSpec, QuantizeSpec, Workload, from_json

pytestmark = pytest.mark.gpu("stages")
KINDS = ("hessian", "absmax", "absmean", "minmax", "samples")
SEQUENTIAL = {
    "gptq_sequential": quantize_spec("gptq", propagation="quantized", true_sequential=True),
    "gptq_quantized": quantize_spec("gptq", propagation="quantized"),
}


def spec_of(name: str) -> QuantizeSpec:
    if name in SEQUENTIAL:
        return SEQUENTIAL[name]
    method = METHODS[name]
    transforms = [t if isinstance(t, str) else transform(t) for t in method.get("transforms", ())]
    activation = from_json(ActivationScheme, method["activation"]) if "activation" in method else None
    weight = from_json(WeightScheme, MATRIX["schemes"][method["scheme"]])
    feeds, params = method.get("feeds", False), method.get("params", {})
    return quantize_spec(method["rounding"], *transforms, weight=weight, activation=activation, feeds=feeds, **params)


def on_cuda(ctx: Context) -> Context:
    return replace(ctx, device=torch.device("cuda"), hints=replace(ctx.hints, device="cuda"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Context, dict[str, Path]]]:
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path_factory.mktemp(device)
        ctx = tiny_context("llama", folder)
        ctx = replace(ctx, device=torch.device(device), hints=replace(ctx.hints, device=device))
        found[device] = ctx, calibrated(ctx, folder, *KINDS)
    return found


@pytest.mark.parametrize("name", [*SEQUENTIAL, *(n for part in PARTS for n in MATRIX[part]["methods"])])
def test_methods_work_on_a_gpu(name: str, places: dict[str, tuple[Context, dict[str, Path]]], tmp_path: Path) -> None:
    spec, found = spec_of(name), {}
    for device, (ctx, statistics) in places.items():
        artifact, summary = quantized(ctx, tmp_path / device, spec, {} if name in SEQUENTIAL else statistics)
        model = rebuild(ctx, ModelSpec("model"), artifact)
        attach_runtime(model, artifact, spec.activation, None)
        with torch.no_grad():
            logits = model(TOKENS.to(ctx.device), use_cache=False).logits.double().cpu()
        assert torch.isfinite(logits).all()
        found[device] = logits, summary
    (want, on_cpu), (got, on_gpu) = found["cpu"], found["cuda"]
    assert on_gpu["coverage"] == on_cpu["coverage"]
    assert on_gpu["bits_stored"] == pytest.approx(on_cpu["bits_stored"], rel=0.02)
    # Found while the next block is at work: read too early they would be anything.
    for error in ("weight_error", "output_error"):
        assert on_gpu[error] == (None if on_cpu[error] is None else pytest.approx(on_cpu[error], rel=0.2)), error
    exact = want.norm()
    # Random weights of some dozens of channels: a code that flips is felt, a wrong scale is worse by far.
    assert float((got - want).norm() / exact) < 0.3, f"{name}: {float((got - want).norm() / exact):.3f}"


@pytest.mark.parametrize("kv", [None, KVScheme(4, kind="kivi", group_size=16, residual_length=16), KVScheme(4)])
def test_a_variant_is_measured_on_a_gpu(kv: KVScheme | None, tmp_path: Path) -> None:
    """Its step is captured, and its memory is the allocator's; energy is counted or has a reason."""
    ctx = on_cuda(tiny_context("gemma", tmp_path))
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(weight=WeightScheme(8, True)), {})
    (tmp_path / "payload").mkdir()
    device = torch.cuda.get_device_name()
    spec = MeasureSpec(ModelSpec("model"), Workload(batch=2, prompt=20, tokens=16), device, kv=kv)
    found = run_measure(spec, {"quantize": artifact}, tmp_path / "payload", ctx, Residency())
    assert found["graph"], ctx.notes
    assert 0 < found["weights_bytes"] <= found["peak_memory_bytes"] <= found["peak_reserved_bytes"]
    assert (found["run_energy_j"] or 0) > 0 or any("energy was not measured" in n for n in ctx.notes)
    assert found.get("kv_backend") == (None if kv is None else kernel("kv_attention", device="cuda").backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_products_of_a_gpu_are_those_of_dequantized_weights(form: str, dtype: str, tmp_path: Path) -> None:
    """Of one row and some, on tensor cores, and of more than these take."""
    folder = tmp_path / "model"
    build("llama_mha", hidden_size=128, intermediate_size=256, num_hidden_layers=1).save_pretrained(folder)
    save_tokenizer(folder)
    ctx = on_cuda(context(folder, tmp_path))
    artifact = made(form, dtype, ctx, tmp_path)
    for rows in (ANY_ROWS, (9, 300)):
        _, found = rebuild_packed(ctx, ModelSpec("model", dtype), artifact, "auto", FORMATS[form][3], rows)
        assert not {DENSE, SIMULATED} & set(found.backends), found.reasons
        assert 0 < found.error <= TOLERANCE[getattr(torch, dtype)]


def test_experts_are_measured_on_a_gpu(tmp_path: Path) -> None:
    """Both models are given one's experts; a step with experts waits for the host, and is launched."""
    folder = tmp_path / "model"
    build("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    save_tokenizer(folder)
    ctx, of = on_cuda(context(folder, tmp_path)), ModelSpec("model", "bfloat16")
    artifact, _ = quantized(ctx, tmp_path / "q", replace(quantize_spec(weight=GROUPS), model=of), {})
    (tmp_path / "payload").mkdir()
    spec = MeasureSpec(of, Workload(batch=2, prompt=20, tokens=8), torch.cuda.get_device_name())
    found = run_measure(spec, {"quantize": artifact}, tmp_path / "payload", ctx, Residency())
    assert set(found["backends"]) == {kernel("wq_gemv", device="cuda").backend}
    assert 0 < found["product_error"] <= TOLERANCE[torch.bfloat16]
    assert found["check_error"] > 0
