"""Toolkits of others: what they are asked, what becomes of their tensors, and how their process may end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.affine import ZeroKind
from quant.methods.toolkits import AutoRound, HqqPackage, LlmCompressor
from quant.scheme import Granularity, WeightScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.strided import StridedTensor
from tests.fake_toolkit import fake_hqq
from tests.workers.stage_runs import W4G16, calibration_text, quantize_spec, quantized, tiny_context
from workers.errors import InputError, UnsupportedModel
from workers.request import ErrorClass
from workers.specs import Component, ModelSpec, QuantizeSpec, Rule
from workers.toolkits import auto_round, hqq_package, llm_compressor, tensors
from workers.toolkits.job import Job, Results, ResultWriter
from workers.toolkits.launch import ToolkitFailure, without_toolkit

G4 = WeightScheme(4, granularity=Granularity.GROUP, group_size=4, scale_dtype="float32")
CODES = torch.tensor([[0.0, 15, 7, 8, 1, 2, 3, 4], [5, 6, 7, 8, 15, 14, 0, 1]])
SCALE = torch.tensor([[0.5, 0.25], [2.0, 0.125]])
ZERO = torch.tensor([[8.0, 0.0], [15.0, 7.0]])


def values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(codes - zero) · scale of groups of 4, written out."""
    return torch.tensor(
        [[(codes[r, c] - zero[r, c // 4]) * scale[r, c // 4] for c in range(codes.shape[1])] for r in range(codes.shape[0])]
    )


# --- tensors ------------------------------------------------------------------------------------------------------------


def test_whole_zeros_within_the_codes_take_their_bits() -> None:
    stored = tensors.affine(CODES, SCALE, ZERO, G4).tensor
    assert isinstance(stored, AffineTensor)
    assert stored.kind is ZeroKind.CODE
    assert torch.equal(stored.dequantize(), values(CODES, SCALE, ZERO))


@pytest.mark.parametrize(
    ("zero", "real", "kind"), [(-3.0, False, ZeroKind.INTEGER), (2.5, True, ZeroKind.FLOAT), (4.0, True, ZeroKind.FLOAT)]
)
def test_other_zeros_keep_their_value(zero: float, real: bool, kind: ZeroKind) -> None:
    zeros = torch.full_like(ZERO, zero)
    stored = tensors.affine(CODES, SCALE, zeros, G4, real_zeros=real).tensor
    assert isinstance(stored, AffineTensor)
    assert stored.kind is kind
    assert torch.equal(stored.dequantize(), values(CODES, SCALE, zeros))


def test_symmetric_codes_store_no_zero_and_may_have_negative_scales() -> None:
    scale = SCALE * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    stored = tensors.affine(CODES, scale, None, G4).tensor
    assert "zero" not in stored.pack()
    weight = values(CODES, scale, torch.full_like(ZERO, 8))
    assert torch.equal(stored.dequantize(), weight)
    assert torch.equal(tensors.codes_of(weight, scale, None, 4), CODES)


def test_codes_come_back_from_a_weight_that_was_rounded_to_bfloat16() -> None:
    # 15 steps off by at most 2^-9 of themselves are off by 0.03 steps.
    scale = torch.tensor([[0.0137, 0.271], [1.93, 0.0079]])
    weight = values(CODES, scale, ZERO).to(torch.bfloat16)
    assert torch.equal(tensors.codes_of(weight, scale, ZERO, 4), CODES)


@pytest.mark.parametrize("codes", [CODES + 1, CODES - 1, CODES + 0.5])
def test_what_are_no_codes_is_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected whole numbers in 0 \.\. 15"):
        tensors.affine(codes, SCALE, ZERO, G4)


@pytest.mark.parametrize("scale", [1e6, 1e-8])
def test_scales_that_float16_cannot_hold_are_stored_in_float32_and_noted(scale: float) -> None:
    half = replace(G4, scale_dtype="float16")
    rounded = tensors.affine(CODES, SCALE * scale, ZERO, half)
    assert rounded.tensor.pack()["scale"].dtype is torch.float32
    assert "do not fit float16" in rounded.notes[0]
    assert tensors.affine(CODES, SCALE, ZERO, half).tensor.pack()["scale"].dtype is torch.float16


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_groups_are_rows_or_columns_of_its_own_shape(axis: int) -> None:
    """The package computes (codes - zero) · scale in the shape of its groups, and then reshapes."""
    codes = CODES.reshape(-1, 4) if axis == 1 else CODES.reshape(4, -1)
    size = codes.shape[0] if axis == 1 else codes.shape[1]
    scale = torch.linspace(0.5, 2.0, size).reshape((-1, 1) if axis == 1 else (1, -1))
    zero = torch.linspace(6.3, 8.1, size).reshape(scale.shape)
    rounded = hqq_package.stored(codes, scale, zero, (2, 8), HqqPackage(axis=axis), G4)
    assert isinstance(rounded.tensor, AffineTensor if axis == 1 else StridedTensor)
    assert torch.equal(rounded.tensor.dequantize(), ((codes - zero) * scale).reshape(2, 8))


@pytest.mark.parametrize("symmetric", [False, True])
def test_llm_compressor_has_signed_codes_and_zeros(symmetric: bool) -> None:
    scheme = replace(G4, symmetric=symmetric)
    signed = torch.zeros_like(ZERO) if symmetric else ZERO - 8
    stored = llm_compressor.stored(CODES - 8, SCALE, signed.to(torch.int8), scheme).tensor
    assert isinstance(stored, AffineTensor)
    assert stored.kind is (ZeroKind.CONSTANT if symmetric else ZeroKind.CODE)
    assert torch.equal(stored.codes, CODES.to(torch.uint8))
    assert torch.equal(stored.dequantize(), values(CODES - 8, SCALE, signed))
    one = replace(scheme, granularity=Granularity.TENSOR, group_size=None)
    whole = llm_compressor.stored(CODES - 8, SCALE[0, :1], signed[0, :1], one).tensor
    assert torch.equal(whole.dequantize(), (CODES - 8 - signed[0, 0]) * SCALE[0, 0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_linear_of_auto_round_has_its_scale_and_zp(symmetric: bool) -> None:
    scheme = replace(G4, symmetric=symmetric)
    zero = torch.full_like(ZERO, 8) if symmetric else ZERO
    module = SimpleNamespace(weight=values(CODES, SCALE, zero), scale=SCALE, zp=8 if symmetric else ZERO)
    stored = auto_round.stored(module, "layer", scheme).tensor
    assert isinstance(stored, AffineTensor)
    assert torch.equal(stored.codes, CODES.to(torch.uint8))
    assert torch.equal(stored.dequantize(), module.weight)
    with pytest.raises(UnsupportedModel, match="layer is 2 x 8"):
        auto_round.stored(SimpleNamespace(weight=module.weight), "layer", scheme)


# --- what they are asked --------------------------------------------------------------------------------------------------


def job(method: str, **linears: WeightScheme) -> Job:
    return Job(Component(method, 1), Path("/model"), ModelSpec("m"), linears, "quantized", 3, torch.arange(12).view(2, 6))


def test_arguments_say_what_the_method_and_the_scheme_say() -> None:
    assert hqq_package.arguments(HqqPackage(axis=0), WeightScheme(3)) == {
        "nbits": 3,
        "channel_wise": True,
        "group_size": None,
        "optimize": True,
        "round_zero": False,
        "axis": 0,
    }
    assert hqq_package.arguments(HqqPackage(), G4)["round_zero"] is True
    assert hqq_package.arguments(HqqPackage(round_zero=False), G4)["round_zero"] is False
    asked = llm_compressor.arguments(replace(G4, symmetric=True))
    assert (asked["num_bits"], asked["strategy"], asked["group_size"], asked["symmetric"]) == (4, "group", 4, True)
    assert llm_compressor.arguments(WeightScheme(8))["strategy"] == "channel"


def test_auto_round_is_told_of_every_linear_of_the_blocks() -> None:
    given = job("auto_round", a=G4, b=WeightScheme(3, symmetric=True))
    asked = auto_round.arguments(AutoRound(iters=5, lr=0.1), given, ["a", "b", "c"])
    assert asked["layer_config"] == {
        "a": {"bits": 4, "group_size": 4, "sym": False},
        "b": {"bits": 3, "group_size": -1, "sym": True},
        "c": auto_round.LEFT,
    }
    assert (asked["seed"], asked["scale_dtype"], asked["amp"], asked["lr"]) == (3, "fp32", False, 0.1)
    assert "lr" not in auto_round.arguments(AutoRound(iters=0), given, ["a"])


def test_batches_are_the_calibration_sequences_in_order() -> None:
    tokens = torch.arange(12).view(3, 4)
    assert torch.equal(torch.cat([b["input_ids"] for b in llm_compressor.batches(tokens)]), tokens)


def test_jobs_and_results_travel_unchanged(tmp_path: Path) -> None:
    given = job("llm_compressor", a=G4)
    given.write(tmp_path)
    again = Job.read(tmp_path, torch.device("cpu"))
    assert again.tokens is not None
    assert torch.equal(again.tokens, given.text())
    assert replace(again, tokens=None) == replace(given, tokens=None)
    assert again.made == LlmCompressor()
    writer = ResultWriter(tmp_path)
    rounded = replace(tensors.affine(CODES, SCALE, ZERO, G4), notes=["note"], details={"steps": 2}, damp=0.1)
    writer.add("a", rounded)
    writer.close()
    results = Results(tmp_path)
    found = results.read("a", torch.device("cpu"))
    assert results.names == {"a"}
    assert torch.equal(found.tensor.dequantize(), rounded.tensor.dequantize())
    assert (found.notes, found.details, found.damp) == (["note"], {"steps": 2}, 0.1)


@pytest.mark.parametrize(
    ("cls", "params", "says"),
    [
        (HqqPackage, {"axis": 2}, "axis=2"),
        (LlmCompressor, {"algorithm": "awq"}, "give one of gptq, rtn"),
        (LlmCompressor, {"damp": -1.0}, "damp"),
        (LlmCompressor, {"block_size": 0}, "block_size"),
        (AutoRound, {"iters": -1}, "iters"),
        (AutoRound, {"lr": 0.0}, "lr"),
        (AutoRound, {"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_parameters_are_told(cls: Any, params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cls(**params)


# --- the stage ------------------------------------------------------------------------------------------------------------


def stage(folder: Path, script: str | None = None, method: str = "hqq_package", spec: QuantizeSpec | None = None) -> Any:
    """Run a quantize stage whose environment's Python is a script."""
    if script is not None:
        fake_hqq(folder / "toolkits", script=script)
    context = tiny_context("llama", folder)
    context.toolkits = {"hqq": str(folder / "toolkits" / "hqq")}
    return quantized(context, folder / "q", spec or quantize_spec(method, weight=W4G16), {})


@pytest.mark.parametrize(
    ("script", "error_class", "says"),
    [
        ("echo no such module >&2; exit 3", ErrorClass.INTERNAL, "ended with code 3: no such module"),
        ("kill -9 $$", ErrorClass.MEMORY, r"signal 9 \(SIGKILL\)"),
        ("kill -11 $$", ErrorClass.INFRASTRUCTURE, r"signal 11 \(SIGSEGV\)"),
    ],
)
def test_a_process_that_ends_without_an_outcome_is_a_classed_failure(
    tmp_path: Path, script: str, error_class: ErrorClass, says: str
) -> None:
    with pytest.raises(ToolkitFailure, match=says) as told:
        stage(tmp_path, script)
    assert told.value.error_class is error_class
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["payload"]


def test_a_failure_in_the_toolkit_keeps_its_class(tmp_path: Path) -> None:
    # What `workers.run_stage` writes into the file of outcomes, the last argument.
    line = '{"key": "k", "record": null, "failure": {"error_class": "numerical", "type": "LinAlgError", "message": "singular"}}'
    with pytest.raises(ToolkitFailure, match="hqq: LinAlgError: singular") as told:
        stage(tmp_path, f"echo '{line}' > $5; exit 1")
    assert told.value.error_class is ErrorClass.NUMERICAL


def test_the_worker_too_says_what_its_environment_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"on this host the environment of hqq is not at .*bitgrid toolkit install hqq"):
        stage(tmp_path)
    spec = quantize_spec("hqq_package", weight=W4G16, release="1.0")
    with pytest.raises(InputError, match=r"asks for 1\.0"):
        stage(tmp_path / "other", "exit 3", spec=spec)
    with pytest.raises(InputError, match="names no environment for auto_round"):
        stage(tmp_path / "third", "exit 3", spec=quantize_spec("auto_round", weight=W4G16, feeds=True))


def test_rules_of_a_toolkit_may_differ_in_formats_only(tmp_path: Path) -> None:
    one = quantize_spec("hqq_package", weight=W4G16)
    other = quantize_spec("hqq_package", weight=W4G16, axis=0)
    with pytest.raises(InputError, match="all rules need the same method"):
        stage(tmp_path, "exit 3", spec=replace(one, rules=(*one.rules, replace(other.rules[0], pattern="*.q_proj"))))
    with pytest.raises(InputError, match="leave transforms out"):
        stage(tmp_path / "2", "exit 3", spec=quantize_spec("hqq_package", "clip", weight=W4G16))
    rules: tuple[Rule, ...] = without_toolkit(quantize_spec("llm_compressor", weight=W4G16, propagation="quantized")).rules
    assert rules[0].method.propagation == "original"


def test_the_toolkit_is_given_our_calibration_tokens(tmp_path: Path) -> None:
    """The job is kept by a stand-in for its Python, which copies it away."""
    kept = tmp_path / "kept"
    script = f'cp -r "$(dirname "$3")/job" "{kept}"; exit 3'
    parent = tmp_path / "toolkits"
    fake = fake_hqq(parent, script=script)
    about = next(fake.glob("lib/python*/site-packages")) / "llmcompressor-0.14.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llmcompressor\nVersion: 0.14.0.1\n")
    context = tiny_context("llama", tmp_path)
    context.toolkits = {"llm_compressor": str(fake)}
    with pytest.raises(ToolkitFailure):
        quantized(context, tmp_path / "q", quantize_spec("llm_compressor", weight=W4G16, feeds=True), {})
    found = Job.read(kept, torch.device("cpu"))
    assert torch.equal(found.text(), calibration_text(context, "llama"))
    assert len(found.linears) == 2 * 7
    assert set(found.linears.values()) == {W4G16}
