"""A model whose linears multiply packed: the one that is packed after it was built dense, bit for bit, in the memory of what is packed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.kernels import kernel
from quant.scheme import ActivationScheme, WeightScheme
from tests.live_bytes import LiveBytes
from tests.tiny_models import FAMILIES, build, save_tokenizer
from tests.workers.stage_runs import W4, calibrated, component, context, quantize_spec, quantized, tiny_context, with_calibration
from tests.workers.test_rebuild import logits
from workers import alike, comparison, measure, packed
from workers import rebuild as rebuilding
from workers.context import Context
from workers.errors import InputError
from workers.machine import cpu_model
from workers.packed import Packed, Packer, weights_bytes
from workers.rebuild import rebuild, rebuild_packed
from workers.recipe import Recipe
from workers.residency import Residency
from workers.specs import MeasureSpec, ModelSpec, QuantizeSpec, Workload

MODEL = ModelSpec("model")
A8, W8 = ActivationScheme(8), WeightScheme(8)
REASSEMBLY = component("qllm_reassembly", ratio=0.4)


def packed_afterwards(ctx: Context, artifact: Path, backend: str, activation: ActivationScheme | None) -> tuple[Any, Packed]:
    """Reference: every weight is read and dequantized first."""
    model, recipe = rebuild(ctx, MODEL, artifact), Recipe(artifact)
    packer = Packer(model, recipe, backend, ctx.device, activation)
    packer.pack()
    recipe.apply(model, replace=packer.replace)
    return model, packer.finish()


def same(ctx: Context, artifact: Path, backend: str = "auto", activation: ActivationScheme | None = None) -> Packed:
    want, expected = packed_afterwards(ctx, artifact, backend, activation)
    model, made = rebuild_packed(ctx, MODEL, artifact, backend, activation)
    assert torch.equal(logits(model), logits(want))
    assert made == expected
    assert weights_bytes(model, made) == weights_bytes(want, expected)
    assert not any(p.is_meta for p in model.parameters())
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_one_that_was_dense_first(family: str, tmp_path: Path) -> None:
    """Also where some linears stay as they are, and where all are left dense."""
    ctx = tiny_context(family, tmp_path)
    statistics = calibrated(ctx, tmp_path, "hessian", "absmax")
    ordered = quantize_spec("gptq", "smoothquant", weight=W4, act_order=True)
    artifact, _ = quantized(ctx, tmp_path / "q", ordered, statistics)
    partly, _ = quantized(ctx, tmp_path / "p", quantize_spec(pattern="*.1.*"), {})
    for made in (same(ctx, artifact), same(ctx, artifact, activation=A8), same(ctx, partly)):
        assert made.bytes > 0, made.reasons
    assert list(same(ctx, artifact, "dense").backends) == ["dense"]


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", quantize_spec("rtn", "quarot", weight=W4)),  # its head is untied
        ("opt", with_calibration(quantize_spec("rtn", "quarot", weight=W4))),  # biases that were not there
        ("qwen2", quantize_spec("rtn", REASSEMBLY, weight=W4, activation=ActivationScheme(4, symmetric=False), grid="omni")),
    ],
)
def test_steps_and_folds_are_those_of_the_dense_model(family: str, spec: QuantizeSpec, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", spec, calibrated(ctx, tmp_path, "absmax", "samples", "hessian"))
    assert same(ctx, artifact).bytes > 0
    assert same(ctx, artifact, "reference").bytes > 0


@pytest.mark.parametrize("activation", [None, A8])
@pytest.mark.parametrize("act_order", [False, True])
def test_experts_multiply_packed(act_order: bool, activation: ActivationScheme | None, tmp_path: Path) -> None:
    """All of a module's or none: those that stay dense share a tensor with the others."""
    model = build("mixtral", intermediate_size=64)
    model.save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    ctx = context(tmp_path / "m", tmp_path)
    statistics = calibrated(ctx, tmp_path, "hessian")
    experts = model.model.layers[0].mlp.experts
    made = []
    for name, pattern in (("all", "*"), ("up", "*gate_up_proj*"), ("one", "*.0")):
        spec = quantize_spec("gptq", pattern=pattern, weight=W8 if activation else W4, act_order=act_order)
        artifact, _ = quantized(ctx, tmp_path / name, spec, statistics)
        made.append(same(ctx, artifact, activation=activation))
        if activation is None:
            got, want = logits(rebuild_packed(ctx, MODEL, artifact, "auto", None)[0]), logits(rebuild(ctx, MODEL, artifact))
            assert (got - want).norm() <= comparison.TOLERANCE["float32"] * want.norm()
    assert sum(made[0].backends.values()) == 2 * (4 + 2 * len(experts.gate_up_proj))
    whole, *rest = made
    assert not whole.reasons
    for other in rest:
        assert set(other.reasons) == {"other experts of the module are not packed"}
        assert list(other.backends) == ["dense" if activation is None else "simulated"]


@pytest.fixture
def deep(tmp_path: Path) -> tuple[Path, Any]:
    """Its weights are in the blocks, of which there are many."""
    model = build("llama", num_hidden_layers=8, hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "m")
    artifact, _ = quantized(context(tmp_path / "m", tmp_path), tmp_path / "q", quantize_spec(), {})
    return artifact, model


def sizes(model: Any) -> tuple[int, int]:
    """Bytes of a block's largest linear, and of a block."""
    block = model.model.layers[0]
    linears = [m.weight.nbytes for m in block.modules() if isinstance(m, torch.nn.Linear)]
    return max(linears), sum(p.nbytes for p in block.parameters())


def test_no_dense_weight_is_in_memory_while_it_is_built(deep: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what stays: of one linear the codes as stored, a byte each, and laid out for the kernel, less than it takes twice in float32.
    A single dense block is more. It is checked by some rows at once."""
    artifact, original = deep
    monkeypatch.setattr(alike, "AT_ONCE", 1024)
    linear, block = sizes(original)
    with LiveBytes() as live:
        model, made = rebuild_packed(context(tmp_path / "m", tmp_path), MODEL, artifact, "auto", None, (1, 20))
    assert set(made.reasons) == set()
    assert live.now >= made.bytes
    assert live.peak <= weights_bytes(model, made) + 2 * linear < weights_bytes(model, made) + block


def test_a_model_is_timed_where_its_packed_weights_fit(deep: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the check against the simulated model, which is streamed: a block, and what dequantizes a linear of it, are in memory."""
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)
    artifact, original = deep
    _, block = sizes(original)
    whole = sum(p.nbytes for p in original.parameters())
    (tmp_path / "payload").mkdir()
    spec = MeasureSpec(MODEL, Workload(batch=2, prompt=6, tokens=3, threads=1), cpu_model())

    def measured(memory_bytes: int) -> dict[str, Any]:
        ctx = context(tmp_path / "m", tmp_path, memory_bytes=memory_bytes)
        return measure.run_measure(spec, {"quantize": artifact}, tmp_path / "payload", ctx, Residency())

    with LiveBytes() as live:
        found = measured(whole // 2)
    assert found["check_error"] <= comparison.TOLERANCE["float32"]
    assert live.peak <= found["weights_bytes"] + 2 * block < whole // 2
    assert measured(found["weights_bytes"])["weights_bytes"] == found["weights_bytes"]
    with pytest.raises(InputError, match=r"do not fit hints.memory_bytes=.*would be the disk's"):
        measured(found["weights_bytes"] - 1)


def test_a_linear_is_not_left_dense_for_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be for a kernel that does not take it."""

    def full(tensor: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel("wq_gemv").run, "prepare", full)
    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(), {})
    with pytest.raises(torch.OutOfMemoryError):
        rebuild_packed(ctx, MODEL, artifact, "auto", None)


@pytest.mark.parametrize(
    ("dtype", "rows", "twice"),
    [
        ("bfloat16", packed.ANY_ROWS, True),
        ("bfloat16", (1, 128), True),
        ("bfloat16", (16, 2048), True),
        ("bfloat16", (1, 512), False),
        ("bfloat16", (8, 257), False),
        ("float32", (16, 128), False),
    ],
)
def test_codes_are_laid_out_for_tensor_cores_where_some_product_is_theirs(
    dtype: str, rows: Collection[int], twice: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layout is as large as the other: with a short prompt or many sequences alone is it worth that."""
    asked: list[Any] = []

    def beside(stored: Any, *_: Any) -> tuple[None, None]:
        asked.append(stored)
        return None, None

    monkeypatch.setattr(packed, "_with_tensor_cores", beside)
    ctx, model = tiny_context("llama", tmp_path), replace(MODEL, dtype=dtype)
    artifact, _ = quantized(ctx, tmp_path / "q", replace(quantize_spec(), model=model), {})
    _, made = rebuild_packed(ctx, model, artifact, "auto", None, rows)
    assert len(asked) == (sum(n for name, n in made.backends.items() if name != "dense") if twice else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_measurement_knows_how_many_rows_its_products_have(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)
    given: set[int] = set()
    seen: set[int] = set()

    class Watched(Packer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            given.update(self._rows)

    def watched(module: torch.nn.Module, product: Any) -> None:
        multiply(module, product)
        module.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[:-1].numel()))

    multiply = packed._multiply
    monkeypatch.setattr(packed, "_multiply", watched)
    monkeypatch.setattr(rebuilding, "Packer", Watched)
    ctx = tiny_context(family, tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(), {})
    (tmp_path / "payload").mkdir()
    batch = 1 if family == "rwkv" else 2
    spec = MeasureSpec(MODEL, Workload(batch=batch, prompt=6, tokens=3, threads=1), cpu_model())
    measure.run_measure(spec, {"quantize": artifact}, tmp_path / "payload", ctx, Residency())
    assert given == {batch, 6 * batch}
    assert seen == given
