"""A kernel that is wrong is found out, whatever the format, the model's type and the rounding of activations; a right one passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.kernels import kernel
from quant.kernels.products import TENSOR_CORE_ROWS
from quant.methods.rtn import Rtn
from quant.scheme import ActivationScheme, Granularity, WeightScheme
from quant.tensors.codebook import CodebookTensor, Outliers
from tests.tiny_models import build, save_tokenizer
from tests.workers.stage_runs import calibrated, context, quantize_spec, quantized
from workers import alike, comparison, measure, packed
from workers.blocks import linear_view
from workers.context import Context
from workers.errors import NumericalError
from workers.machine import cpu_model
from workers.rebuild import rebuild_packed
from workers.recipe import Recipe
from workers.residency import Residency
from workers.specs import MeasureSpec, ModelSpec, Workload

DTYPES = ("float32", "bfloat16", "float16")
GROUPS = WeightScheme(3, granularity=Granularity.GROUP, group_size=32)
A4 = ActivationScheme(4, symmetric=False)
FORMATS: dict[str, tuple[str, str, WeightScheme, ActivationScheme | None]] = {
    "codes": ("wq_gemv", "rtn", GROUPS, None),
    "integers": ("int8_linear", "rtn", WeightScheme(4), A4),
    "codebooks": ("lut_gemv", "claq", WeightScheme(2), None),
    "codebooks of rows": ("row_lut_gemv", "squeezellm", WeightScheme(3), None),
    "signs": ("binary_gemv", "billm", WeightScheme(1), None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of several groups, and biases."""
    folder = tmp_path_factory.mktemp("model")
    build("llama_mha", hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def made(form: str, dtype: str, ctx: Context, folder: Path) -> Path:
    _, method, weight, _ = FORMATS[form]
    statistics = {} if method == "rtn" else calibrated(ctx, folder / "s", "hessian", dtype=dtype)
    spec = replace(quantize_spec(method, weight=weight), model=ModelSpec("model", dtype))
    return quantized(ctx, folder / "q", spec, statistics)[0]


def hundredth_more(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given, **more: function(*given, **more) * 1.01


def of_another(function: Callable[..., Any]) -> Callable[..., Any]:
    """Prepares a weight whose ranges, tables or signs come in another order."""

    def prepare(tensor: Any, *given: Any) -> Any:
        name = next(n for n in ("tables", "signs", "scale") if hasattr(tensor, n))
        axis = 1 if name == "scale" and tensor.scale.shape[1] > 1 else 0
        return function(replace(tensor, **{name: getattr(tensor, name).flip(axis).contiguous()}), *given)

    return prepare


def one_higher(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor, *given: function(replace(tensor, zero=tensor.zero + 1), *given)


def without_bias(function: Callable[..., Any]) -> Callable[..., Any]:
    def multiply(module: Any, product: Any) -> None:
        module.forward = product

    return multiply


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_wrong_kernel_is_no_measurement(form: str, dtype: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, _, _, activation = FORMATS[form]
    ctx = context(model, tmp_path)
    artifact, run = made(form, dtype, ctx, tmp_path), kernel(operation).run
    multiply = "multiply" if operation == "int8_linear" else operation
    changes: list[tuple[Any, str, Callable[[Any], Any], str]] = [
        (run, multiply, hundredth_more, "packed differs from its dequantized weight"),
        (run, "prepare", of_another, "packed differs from its dequantized weight"),
        (packed, "_multiply", without_bias, "packed adds another bias"),
    ]
    if operation in ("wq_gemv", "int8_linear"):
        changes.append((run, "prepare", one_higher, "packed differs from its dequantized weight"))
    _, right = rebuild_packed(ctx, ModelSpec("model", dtype), artifact, "auto", activation, (2, 40))
    assert 0 < right.error <= alike.TOLERANCE[getattr(torch, dtype)]
    assert not right.products
    for where, name, change, message in changes:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, change(getattr(where, name)))
            with pytest.raises(NumericalError, match=message):
                rebuild_packed(ctx, ModelSpec("model", dtype), artifact, "auto", activation, (2, 40))


def test_all_ways_through_a_linear_are_gone() -> None:
    assert [len(r) for r in alike._chosen({1, 2048})] == [1, 1, 1, 1, alike.MOST_ROWS]
    assert [len(r) for r in alike._chosen(range(1, 257))] == [1, 1, 1, 1, 256]
    assert [len(r) for r in alike._chosen(range(1, 2049))] == [1, 1, 1, 1, TENSOR_CORE_ROWS, alike.MOST_ROWS]
    assert [len(r) for r in alike._chosen({7})] == [7, 7, 2]


@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_is_dequantized_by_some_rows_at_once(form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made(form, "float32", context(model, tmp_path), tmp_path)
    monkeypatch.setattr(alike, "AT_ONCE", 64 * 5)
    recipe = Recipe(artifact)
    for op in recipe.replaced():
        stored: Any = recipe.stored(op)
        if form == "codebooks":  # with some kept aside
            counts = torch.arange(stored.shape[1]) % 3
            rows = torch.cat([torch.arange(int(c)) * 7 for c in counts])
            stored = replace(stored, outliers=Outliers(counts, rows, torch.randn(len(rows))))
        parts = [part.dequantize() for part in alike._parts(stored)]
        assert len(parts) > 1
        assert torch.equal(torch.cat(parts), stored.dequantize())


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("grid", ["g_sym", "g_asym"])
def test_zeros_are_what_sums_of_codes_leave_of_them(grid: str, rows: int) -> None:
    """All rows but some: what is taken off a sum of codes leaves its roundings, which no product of zeros is to be held to."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 1e-3
    weight[rows:] = 0
    stored: Any = Rtn(grid=grid).quantize(weight, {}, WeightScheme(4, granularity=Granularity.GROUP, group_size=128)).tensor
    view = linear_view(nn.ModuleDict({"linear": nn.Linear(512, 256)}), "linear")
    codes, scale, zero = (t.float() for t in (stored.codes, stored.columns(stored.scale), stored.columns(stored.zero)))

    def multiply(x: Tensor, more: float = 0.0) -> Tensor:
        return x @ (codes * scale).T - x.flip(1) @ ((zero + more) * scale).flip(1).T  # in another order

    assert float(multiply(torch.randn(8, 512)).abs().max()) > 0
    assert alike.check_product(view, stored, multiply, (1, 40), None, torch.device("cpu")) <= 2.0**-12
    with pytest.raises(NumericalError, match="packed differs"):
        alike.check_product(view, stored, lambda x: multiply(x, 1.0), (1, 40), None, torch.device("cpu"))


def test_zeros_of_a_codebook_are_part_of_its_product() -> None:
    """A row may have values that are 0 of tables that are not, which terms add up to but for their roundings."""
    g = torch.Generator().manual_seed(1)
    tables = torch.cat([torch.zeros(512, 1), torch.randn(512, 3, generator=g)], 1)
    codes = torch.randint(4, (64, 512), generator=g).to(torch.uint8)
    codes[7] = 0
    stored = CodebookTensor(codes, torch.full((512,), 2), tables, 2.0)
    view = linear_view(nn.ModuleDict({"linear": nn.Linear(512, 64)}), "linear")
    assert (
        0 < alike.check_product(view, stored, lambda x: x @ (stored.dequantize() + 1e-6).T, (1, 40), None, torch.device("cpu")) <= 2.0**-16
    )


def test_experts_are_checked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    build("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    save_tokenizer(folder)
    ctx = context(folder, tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(weight=GROUPS), {})
    run, calls = kernel("wq_gemv").run, iter(range(10**6))
    rebuild_packed(ctx, ModelSpec("model"), artifact, "auto", None, (2, 12))
    before = run.prepare
    monkeypatch.setattr(run, "prepare", lambda t: (one_higher if next(calls) == 6 else lambda f: f)(before)(t))
    with pytest.raises(NumericalError, match=r"experts\.\w+\.\d packed differs"):
        rebuild_packed(ctx, ModelSpec("model"), artifact, "auto", None, (2, 12))


def test_rounding_that_a_deep_model_enlarges_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of large random weights: logits in bfloat16 move by more than the tolerance."""
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)
    folder = tmp_path / "model"
    build("llama_mha", hidden_size=64, intermediate_size=128, num_hidden_layers=4).save_pretrained(folder)
    save_tokenizer(folder)
    ctx, of = context(folder, tmp_path), ModelSpec("model", "bfloat16")
    weight = WeightScheme(2, granularity=Granularity.GROUP, group_size=32)
    artifact, _ = quantized(ctx, tmp_path / "q", replace(quantize_spec(weight=weight), model=of), {})
    (tmp_path / "payload").mkdir()
    spec = MeasureSpec(of, Workload(batch=2, prompt=20, tokens=6, threads=1), cpu_model())
    found = measure.run_measure(spec, {"quantize": artifact}, tmp_path / "payload", ctx, Residency())
    assert found["check_error"] > comparison.TOLERANCE["bfloat16"]
    assert found["product_error"] < found["check_error"]


def test_results_are_jittered_by_a_step_of_their_type() -> None:
    linear = nn.Linear(8, 64).bfloat16()
    x = torch.randn(3, 8).bfloat16()
    plain = linear(x).detach()
    with alike.jittered(linear):
        found = linear(x).detach()
    moved = (found.float() / plain.float() - 1).abs()
    assert bool((moved > 0).any())
    assert float(moved.max()) <= torch.finfo(torch.bfloat16).eps
    assert torch.equal(linear(x), plain)
