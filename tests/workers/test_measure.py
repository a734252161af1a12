"""The measure stage on tiny models: packed weights give the simulated logits, times are summed up as they were taken, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.kernels import TABLE, kernel
from quant.kernels.products import with_many_rows
from quant.kernels.wq_gemv import STEP
from quant.scheme import ActivationScheme, Granularity, KVScheme, WeightScheme
from quant.tensors.affine import AffineTensor
from tests.quant.products_affine import inputs, stored
from tests.tiny_models import tiny_model
from tests.workers.fake_devices import FakeNvml, fake_capture
from tests.workers.stage_runs import calibrated, quantize_spec, quantized, tiny_context
from workers import alike, families, generation, nvml, packed
from workers.comparison import TOLERANCE, Comparison, Noise, distance, require_close
from workers.context import Context
from workers.errors import InputError, NumericalError
from workers.generation import NoGraph
from workers.machine import cpu_model
from workers.measure import FEWEST, run_measure
from workers.rebuild import rebuild, rebuild_packed
from workers.recipe import Recipe
from workers.residency import Residency
from workers.specs import MeasureSpec, ModelSpec, Workload

SMALL = Workload(batch=2, prompt=6, tokens=3, threads=1)


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as there may be."""
    monkeypatch.setattr("workers.measure.LONGEST_S", 0.0)


def measured(
    context: Context,
    folder: Path,
    artifact: Path | None,
    device: str | None = None,
    activation: ActivationScheme | None = None,
    kv: KVScheme | None = None,
    **workload: Any,
) -> dict[str, Any]:
    (folder / "payload").mkdir(parents=True)
    spec = MeasureSpec(ModelSpec("model"), replace(SMALL, **workload), device or cpu_model(), activation, kv)
    return run_measure(spec, {"quantize": artifact} if artifact else {}, folder / "payload", context, Residency())


@pytest.mark.parametrize("family", ["llama", "llama_mha", "opt"])
def test_packed_weights_are_timed_where_a_kernel_takes_them(family: str, tmp_path: Path) -> None:
    context = tiny_context(family, tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    base = measured(context, tmp_path / "base", None)
    found = measured(context, tmp_path / "packed", artifact)
    shapes = families.linear_shapes(rebuild(context, ModelSpec("model"), artifact).config.to_dict())
    fitting = sum(s.cols % STEP == 0 for s in shapes)
    assert 0 < fitting
    chosen = kernel("wq_gemv").backend
    assert found["backends"] == {k: n for k, n in ((chosen, fitting), ("dense", len(shapes) - fitting)) if n}
    assert found["check_error"] <= TOLERANCE["float32"]
    assert 0 < found["packed_bytes"] < found["weights_bytes"] < base["weights_bytes"]
    assert (base["backends"], base["packed_bytes"], base["check_error"]) == ({}, 0, None)
    assert base["disk_bytes"] == sum(t.nbytes for t in load_file(tiny_model(family) / "model.safetensors").values())
    assert found["threads"] == 1
    assert found["device"] == base["device"] == cpu_model()
    assert found["weights_bytes"] <= found["peak_memory_bytes"]
    assert 0 < found["product_error"] <= alike.TOLERANCE[torch.float32]
    assert (base["product_error"], base["products"], base["bits_stored"]) == (None, [], None)


def test_a_cache_in_fewer_bits_is_read_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With packed weights; float32, in which codes of the cache are those of the simulation."""
    context = tiny_context("gemma", tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(weight=WeightScheme(8, True)), {})
    kv = KVScheme(2, kind="kivi", group_size=16, residual_length=16)
    found = measured(context, tmp_path / "m", artifact, kv=kv, prompt=20, tokens=4)
    assert (found["kv_backend"], found["graph"]) == ("reference", False)
    assert found["check_error"] <= TOLERANCE["float32"]
    assert 0 < found["kv_error"] <= TOLERANCE["float32"]
    # The last step reads the cache before it ages: of 24 tokens 16 keys and 23 - 16 values are codes, of 2 bits with 4 bytes for 16 of
    # them; the others are float32.
    coded, rest = 16 + 7, 48 - (16 + 7)
    assert found["kv_bytes"] == 2 * 2 * 16 * (coded * (2 / 8 + 4 / 16) + rest * 4)
    assert any("kv_attention ran as its reference" in n for n in context.notes)
    with pytest.raises(InputError, match=r"kv\.group_size=8"):
        measured(context, tmp_path / "r", artifact, kv=KVScheme(4, group_size=8))


def test_w4a16kv4_is_decoded_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and cache as they are stored: figures, and the simulated logits."""
    monkeypatch.setattr("workers.measure.LONGEST_S", 0.0)
    context = tiny_context("gemma", tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    found = measured(context, tmp_path / "m", artifact, kv=KVScheme(4), prompt=20, tokens=4)
    assert found["check_error"] <= TOLERANCE["float32"]
    assert found["runs"] >= FEWEST
    assert found["decode_p50_s"] > 0
    assert found["kv_backend"] == "reference"
    assert kernel("wq_gemv").backend in found["backends"]
    # 24 tokens of 16 channels of keys and of values, 4 bits each, and 48 bits of range for both.
    assert found["kv_bytes"] == 2 * 2 * 24 * 2 * (16 * 4 + 48) // 8


@pytest.mark.parametrize("counted", [True, False])
def test_what_a_gpu_has_besides(counted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step as one launch, joules and clocks: the same path as on a GPU, whose parts are stood in for."""

    def gpu(device: str) -> nvml.Gpu:
        if not counted:
            raise nvml.NotTold("nobody counts")
        return nvml.Gpu(FakeNvml(), "1234")

    monkeypatch.setattr(nvml, "gpu", gpu)
    monkeypatch.setattr(nvml, "LEAST_S", 0.01)
    monkeypatch.setattr(generation, "has_graphs", lambda device: True)
    monkeypatch.setattr(generation, "captured", fake_capture if counted else cannot_capture)
    context = tiny_context("llama", tmp_path)
    artifact, summary = quantized(context, tmp_path / "q", quantize_spec(weight=WeightScheme(8, True)), {})
    record = artifact / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "summary": summary}))
    found = measured(context, tmp_path / "m", artifact)
    assert found["graph"] is counted
    assert any("not as a CUDA graph: no such thing" in n for n in context.notes) is not counted
    assert found["run_energy_j"] == (pytest.approx(12.0 / found["runs"]) if counted else None)
    assert found["token_energy_j"] == (pytest.approx(found["run_energy_j"] / (2 * SMALL.tokens)) if counted else None)
    assert (found["disk_bytes"], found["bits_stored"]) == (summary["model_bytes"], summary["bits_stored"])
    assert found["peak_reserved_bytes"] is None


def cannot_capture(step: Any, device: torch.device) -> Any:
    raise NoGraph("no such thing")


def test_replayed_logits_that_depart_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "has_graphs", lambda device: True)
    monkeypatch.setattr(generation, "captured", lambda step, device: (lambda: None, torch.zeros_like(step())))
    context = tiny_context("llama", tmp_path)
    assert measured(context, tmp_path / "m", None)["graph"] is False
    assert any("its logits differ from those of steps that are not captured" in n for n in context.notes)


def test_every_time_is_kept_and_summed_up(tmp_path: Path) -> None:
    found = measured(tiny_context("llama", tmp_path), tmp_path / "m", None)
    times = json.loads((tmp_path / "m" / "payload" / "times.json").read_text())
    steps = torch.tensor(times["decode"], dtype=torch.float64)
    assert steps.shape == (found["runs"], SMALL.tokens)
    assert found["runs"] >= FEWEST
    assert found["decode_p50_s"] == pytest.approx(steps.quantile(0.5, dim=1).quantile(0.5).item())
    assert found["decode_p95_s"] == pytest.approx(steps.quantile(0.95).item())
    assert found["prefill_p95_s"] == pytest.approx(torch.tensor(times["prefill"], dtype=torch.float64).quantile(0.95).item())
    assert found["decode_tokens_per_s"] == pytest.approx(SMALL.batch * SMALL.tokens / steps.sum(1).quantile(0.5).item())
    assert found["decode_low_s"] <= found["decode_p50_s"] <= found["decode_high_s"]


@pytest.mark.parametrize(("method", "operation"), [("claq", "lut_gemv"), ("squeezellm", "row_lut_gemv"), ("billm", "binary_gemv")])
def test_codebooks_and_signs_are_multiplied_packed(method: str, operation: str, tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    artifact = made_by(method, context, tmp_path)
    found = measured(context, tmp_path / "m", artifact)
    assert list(found["backends"]) == [kernel(operation).backend]
    assert found["check_error"] <= TOLERANCE["float32"]


@pytest.mark.parametrize("method", ["rtn", "claq", "billm"])
def test_longer_prompts_are_multiplied_with_weights_made_for_it(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context("llama", tmp_path)
    artifact = quantized(context, tmp_path / "q", quantize_spec(), {})[0] if method == "rtn" else made_by(method, context, tmp_path)
    rows: list[int] = []
    monkeypatch.setitem(packed.MANY_ROWS, "cpu", 32)
    monkeypatch.setattr(packed, "with_many_rows", lambda x, *given: rows.append(len(x)) or with_many_rows(x, *given))
    found = measured(context, tmp_path / "m", artifact, prompt=20)
    assert found["check_error"] <= TOLERANCE["float32"]
    assert set(rows) == {SMALL.batch * 20}


def test_some_rows_are_multiplied_by_tensor_cores_where_there_are_any() -> None:
    """The limits, and that other rows and float32 go the other way; both ways end in the same product."""
    tensor = stored(5, 96, 4, 32)
    run, gemm = kernel("wq_gemv", "reference").run, kernel("wq_gemm", "reference").run
    rows: list[int] = []
    cores = SimpleNamespace(__name__="a.triton", wq_gemm=lambda x, weight: rows.append(len(x)) or gemm.wq_gemm(x, weight))
    layer = torch.nn.Linear(96, 5, bias=False)
    ran: set[str] = set()
    packed._multiply(layer, packed._rows_product(run, "wq_gemv", tensor, cores, tensor, None, ran))
    for m in (1, 8, 9, 256, 257):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(m, 96, generator=torch.Generator().manual_seed(m)).to(dtype)
            want = x.double() @ tensor.dequantize().double().T
            assert torch.allclose(layer(x).double(), want, rtol=2.0**-8, atol=1e-4)
    assert rows == [9, 256]
    assert ran == {"wq_gemv: reference", "wq_gemm: triton"}
    packed._multiply(layer, packed._rows_product(run, "wq_gemv", tensor, None, None, None, ran))
    layer(torch.zeros(513, 96))
    assert "weight made, wq_gemv: reference" in ran


@pytest.mark.parametrize(("scaled", "expected"), [(False, [17]), (True, [9, 16, 17])])
def test_a_backend_that_takes_more_rows_at_once_keeps_them(scaled: bool, expected: list[int]) -> None:
    """In bfloat16 and without an input scale; in other types tensor cores have them still."""
    tensor = stored(5, 96, 4, 32, scaled=scaled)
    own, gemm = kernel("wq_gemv", "reference").run, kernel("wq_gemm", "reference").run
    calls: list[int] = []

    def product(x: torch.Tensor, weight: AffineTensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.cat([own.wq_gemv(part, weight) for part in x.split(8)])

    rows: list[int] = []
    cores = SimpleNamespace(wq_gemm=lambda x, weight: rows.append(len(x)) or gemm.wq_gemm(x, weight))
    layer = torch.nn.Linear(96, 5, bias=False)
    packed._multiply(layer, packed._rows_product(SimpleNamespace(wq_gemv=product, MOST_ROWS=16), "wq_gemv", tensor, cores, tensor))
    for m in (8, 9, 16, 17):
        x = inputs(m, 96, torch.bfloat16)
        assert torch.equal(layer(x), gemm.wq_gemm(x, tensor))
    assert (rows, calls) == (expected, [m for m in (8, 9, 16) if m not in expected])
    layer(inputs(16, 96, torch.float16))
    layer(inputs(20, 96, torch.float32))
    assert (rows[len(expected) :], calls[-2:]) == ([16], [16, 4])


def test_formats_without_a_kernel_run_dense_and_say_so(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    found = measured(context, tmp_path / "m", made_by("pb_llm", context, tmp_path))
    assert list(found["backends"]) == ["dense"]
    assert any("ran dense: the stored format partially_binary has no packed product" in n for n in context.notes)


@pytest.mark.parametrize("activation", [ActivationScheme(8), ActivationScheme(4, symmetric=False)])
@pytest.mark.parametrize("weight", [WeightScheme(8, True), WeightScheme(4)])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rounded_activations_are_multiplied_as_integers(
    family: str, weight: WeightScheme, activation: ActivationScheme, tmp_path: Path
) -> None:
    context = tiny_context(family, tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(weight=weight), {})
    found = measured(context, tmp_path / "m", artifact, activation=activation)
    shapes = families.linear_shapes(rebuild(context, ModelSpec("model"), artifact).config.to_dict())
    assert found["backends"] == {kernel("int8_linear").backend: len(shapes)}
    assert 0 < found["packed_bytes"] < found["weights_bytes"]


def test_linears_with_one_input_round_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context("llama", tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(weight=WeightScheme(8, True)), {})
    model, _ = rebuild_packed(context, ModelSpec("model"), artifact, kernel("int8_linear").backend, ActivationScheme(8))
    seen: list[int] = []

    def count(x: Tensor, weight: Any) -> Any:
        seen.append(x.shape[1])
        return rounded(x, weight)

    run = kernel("int8_linear").run
    rounded = run.rounded
    monkeypatch.setattr(run, "rounded", count)
    with torch.inference_mode():
        model(torch.arange(2, 14).view(2, 6))
    config = model.config
    # q, k and v; o; gate and up; down.
    assert len(seen) == 4 * config.num_hidden_layers


def test_linears_that_no_sum_of_integers_has_are_simulated(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    grouped = quantize_spec(weight=WeightScheme(4, granularity=Granularity.GROUP, group_size=16))
    artifact, _ = quantized(context, tmp_path / "q", grouped, {})
    found = measured(context, tmp_path / "m", artifact, activation=ActivationScheme(8))
    assert list(found["backends"]) == ["simulated"]
    assert found["check_error"] == 0
    assert any("ran simulated:" in n and "groups a row" in n for n in context.notes)
    dense = measured(context, tmp_path / "d", artifact, activation=ActivationScheme(8), backend="dense")
    assert (list(dense["backends"]), dense["check_error"]) == (["simulated"], 0)


def test_weights_in_act_order_run_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT's fc2 has two groups, whose columns lie apart; of the others' one group nothing has to be gathered."""
    context = tiny_context("opt", tmp_path)
    statistics = calibrated(context, tmp_path / "s", "hessian")
    weight = WeightScheme(4, granularity=Granularity.GROUP, group_size=32)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec("gptq", weight=weight, act_order=True), statistics)
    recipe, orders = Recipe(artifact), packed._Shared()
    gathered = []
    for op in recipe.replaced():
        stored_tensor = recipe.stored(op)
        made, order = packed._in_order(stored_tensor, orders)
        if order is not None:
            gathered.append(op["module"].rpartition(".")[2])
            assert torch.equal(made.dequantize(), stored_tensor.dequantize()[:, order.columns.long()])
            assert packed._in_order(stored_tensor, orders)[1] is order
    assert set(gathered) == {"fc2"}
    found = measured(context, tmp_path / "m", artifact)
    assert list(found["backends"]) == [kernel("wq_gemv").backend]
    assert found["check_error"] <= TOLERANCE["float32"]


def test_what_an_input_is_divided_by_moves_with_its_column() -> None:
    tensor = replace(stored(5, 64, 4, 32, scaled=True), g_idx=torch.tensor([0, 1] * 32))
    made, order = packed._in_order(tensor, packed._Shared())
    assert order is not None
    assert torch.equal(made.dequantize(), tensor.dequantize()[:, order.columns])


def test_groups_of_unlike_size_stay_where_they_are() -> None:
    tensor = replace(stored(5, 64, 4, 32), g_idx=torch.tensor([0] * 33 + [1] * 31))
    assert packed._in_order(tensor, packed._Shared()) == (tensor, None)


def made_by(method: str, context: Context, folder: Path) -> Path:
    statistics = calibrated(context, folder / "s", "hessian")
    weight = WeightScheme(2) if method in ("claq", "squeezellm") else WeightScheme(1)
    artifact, _ = quantized(context, folder / "q", quantize_spec(method, weight=weight), {"hessian": statistics["hessian"]})
    return artifact


def test_a_backend_that_is_insisted_on_takes_every_linear_or_none(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    five, _ = quantized(context, tmp_path / "five", quantize_spec(weight=WeightScheme(5)), {})
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    dense = measured(context, tmp_path / "d", artifact, backend="dense")
    assert (list(dense["backends"]), dense["product_error"], dense["packed_bytes"]) == (["dense"], None, 0)
    assert list(measured(context, tmp_path / "r", artifact, backend="reference")["backends"]) == ["reference"]
    with pytest.raises(InputError, match=r"workload.backend=cpu does not take .*; use auto, which leaves it dense"):
        measured(context, tmp_path / "m", five, backend="cpu")


def test_a_backend_of_another_formats_kernel_chooses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one name serves a grid of several formats."""
    monkeypatch.setitem(TABLE["wq_gemv"], "another", TABLE["wq_gemv"]["reference"])
    context = tiny_context("llama", tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(weight=WeightScheme(8, True)), {})
    assert list(measured(context, tmp_path / "w", artifact, backend="torch")["backends"]) == list(
        measured(context, tmp_path / "auto", artifact)["backends"]
    )
    found = measured(context, tmp_path / "a", artifact, backend="another", activation=ActivationScheme(8))
    assert list(found["backends"]) == [kernel("int8_linear").backend]


def test_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"this worker's device is .*, the measurement is of 'NVIDIA H200'"):
        measured(tiny_context("llama", tmp_path), tmp_path / "m", None, device="NVIDIA H200")


def test_sequences_that_would_be_mixed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"transformers mixes those of rwkv; use workload\.batch=1"):
        measured(tiny_context("rwkv", tmp_path), tmp_path / "m", None, batch=2)


def test_logits_that_depart_are_no_measurement() -> None:
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0))
    assert distance(logits, logits) == 0
    for wrong in (logits * (1 + 2 * TOLERANCE["float32"]), logits * float("nan")):
        with pytest.raises(NumericalError, match="logits with packed weights differ"):
            require_close("logits", distance(wrong, logits), TOLERANCE["float32"])


def test_two_roundings_of_one_model_are_close_enough(tmp_path: Path) -> None:
    """Independent, each as far from the model without: √2 of that from each other."""
    random = torch.Generator().manual_seed(0)
    exact, one, other = torch.randn(3, 1, 2, 512, generator=random)
    spec = MeasureSpec(ModelSpec("model"), SMALL, cpu_model())
    compared = Comparison(spec, torch.zeros(1, 1), torch.zeros(1, 1), tiny_context("llama", tmp_path))
    simulated, packed = exact + 0.1 * one, exact + 0.1 * other
    assert distance(packed, simulated) > compared.allowed
    compared._noise = Noise(distance(exact, simulated), 0.0)
    assert distance(packed, simulated) <= compared.allowed
