"""Quantize the shipped model by another toolkit and by ourselves: the same checkpoint, the same calibration tokens, the same stage."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.scheme import Granularity, WeightScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.strided import StridedTensor
from tests.workers.stage_runs import commit, component
from workers import datasets
from workers.calibrate import run_calibrate
from workers.context import Context
from workers.quantize import run_quantize
from workers.rebuild import load_model, rebuild
from workers.recipe import Recipe
from workers.request import Hints, Location
from workers.specs import CalibrateSpec, CalibrationSpec, MethodSpec, ModelSpec, QuantizeSpec, Rule, TextSpec
from workers.toolkits.environments import TOOLKITS, installed_release

ASSETS = Path(__file__).resolve().parents[2] / "workers" / "assets"
MODEL = ModelSpec("model")
CALIBRATION = CalibrationSpec(TextSpec("text", field="text"), samples=16, sequence_length=128)
FOLDER = Path(os.environ.get("BITGRID_TOOLKITS", "bitgrid-toolkits")).resolve()


def needs(toolkit: str) -> pytest.MarkDecorator:
    there = installed_release(FOLDER / toolkit, TOOLKITS[toolkit].package) is not None
    return pytest.mark.skipif(not there, reason=f"no environment {FOLDER / toolkit}; make it with `bitgrid toolkit install {toolkit}`")


def weights(bits: int, group_size: int | None = None, *, symmetric: bool = False) -> WeightScheme:
    """With float32 scales: a stored scale then is the one that codes were chosen for."""
    granularity = Granularity.CHANNEL if group_size is None else Granularity.GROUP
    return WeightScheme(bits, symmetric, granularity, group_size, "float32")


def context() -> Context:
    return Context(
        models={"model": Location("folder", str(ASSETS / "wikitext_llama"))},
        texts={"text": Location("file", str(ASSETS / "self_text" / "calibration.jsonl"))},
        hints=Hints(device="cpu", threads=1),
        device=torch.device("cpu"),
        toolkits={name: str(FOLDER / name) for name in TOOLKITS},
    )


@dataclass
class Quantized:
    artifact: Path
    summary: dict[str, Any]
    notes: list[str]
    tensors: dict[str, Any] = field(default_factory=dict)
    """Linear ▸ stored tensor."""


def quantize(
    folder: Path,
    scheme: WeightScheme,
    method: str,
    *,
    feeds: bool = False,
    propagation: str = "original",
    seed: int | None = None,
    **params: Any,
) -> Quantized:
    ctx = context()
    rule = Rule("*", MethodSpec(component(method, **params), propagation=propagation), scheme)
    calibration = CALIBRATION if feeds or propagation == "quantized" else None
    spec = QuantizeSpec(MODEL, (rule,), calibration=calibration, seed=seed)
    inputs = {"hessian": hessian(folder / "hessian")} if method == "gptq" and propagation == "original" else {}
    (folder / method / "payload").mkdir(parents=True)
    summary = run_quantize(spec, inputs, folder / method / "payload", ctx)
    made = Quantized(commit(folder / method), summary, ctx.notes)
    recipe = Recipe(made.artifact)
    made.tensors = {op["module"]: recipe.stored(op) for op in recipe.replaced()}
    return made


def hessian(folder: Path) -> Path:
    """Committed Hessians of the unquantized model."""
    (folder / "payload").mkdir(parents=True)
    run_calibrate({"h": (CalibrateSpec(MODEL, CALIBRATION, "hessian"), folder / "payload")}, context())
    return commit(folder)


def tokens() -> Tensor:
    """The calibration sequences `[S, T]`."""
    tokenizer = datasets.load_tokenizer(Location("folder", str(ASSETS / "wikitext_llama")))
    return datasets.calibration_tokens(context().texts["text"], CALIBRATION, tokenizer)


def divergence(*made: Quantized) -> list[float]:
    """Mean KL divergence of each from the unquantized model's predictions on the calibration text."""
    text, out = tokens(), []
    with torch.no_grad():
        reference = load_model(context(), MODEL)(text, use_cache=False).logits.double().log_softmax(-1)
        for one in made:
            logits = rebuild(context(), MODEL, one.artifact)(text, use_cache=False).logits.double().log_softmax(-1)
            out.append(float((reference.exp() * (reference - logits)).sum(-1).mean()))
    return out


@dataclass(frozen=True)
class Agreement:
    """Over all linears given."""

    equal: float
    """Share of equal codes."""
    most: int
    """Largest difference of two codes."""
    scale: float
    """Largest relative difference of two scales."""
    zeros: float
    """Share of weights whose group has the same zero, up to 1e-3 of a code."""
    equal_there: float
    """Share of equal codes among those."""


def agreement(theirs: Quantized, ours: Quantized, names: list[str] | None = None) -> Agreement:
    equal = count = most = same = equal_there = 0
    scale = 0.0
    assert set(theirs.tensors) == set(ours.tensors)
    for name in names or list(ours.tensors):
        a, b = theirs.tensors[name], ours.tensors[name]
        difference = (a.codes.int() - b.codes.int()).abs()
        there = (zeros(a) - zeros(b)).abs().expand_as(difference) < 1e-3
        equal += int((difference == 0).sum())
        same += int(there.sum())
        equal_there += int(((difference == 0) & there).sum())
        count += difference.numel()
        most = max(most, int(difference.max()))
        scale = max(scale, float(((a.scale - b.scale).abs() / b.scale.abs()).max()))
    found = Agreement(equal / count, most, scale, same / count, equal_there / same)
    print(found)
    return found


def zeros(tensor: AffineTensor | StridedTensor) -> Tensor:
    """The zero of each weight, `[N, K]` or `[1, K]`."""
    if isinstance(tensor, AffineTensor):
        return tensor.columns(tensor.zero)
    return tensor.zero.float().expand(tensor.codes.numel() // tensor.zero.numel(), -1).reshape(tensor.codes.shape)
