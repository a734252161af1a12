"""Run worker stages on tiny models in tests: contexts, texts, and artifacts committed the way the driver commits them."""

from __future__ import annotations

import json
import random
import shutil
import string
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant.methods.registry import MODEL_TRANSFORMS, ROUNDINGS, TOOLKIT_METHODS, TRANSFORMS, TUNERS
from quant.scheme import ActivationScheme, Granularity, WeightScheme
from tests.tiny_models import tiny_model
from workers import datasets, families
from workers.artifact import payload_files
from workers.blocks import linear_view
from workers.calibrate import run_calibrate
from workers.context import Context
from workers.quantize import run_quantize
from workers.request import Hints, Location
from workers.specs import CalibrateSpec, CalibrationSpec, Component, MethodSpec, ModelSpec, QuantizeSpec, Rule, TextSpec, to_json

CALIBRATION = CalibrationSpec(TextSpec("text"), samples=6, sequence_length=12)
W4 = WeightScheme(4)
W4G16 = WeightScheme(4, granularity=Granularity.GROUP, group_size=16)


def text_file(folder: Path, rows: int = 60) -> Path:
    """Random printable rows, the same in every run."""
    draw = random.Random(0)
    letters = string.ascii_letters + string.digits + " .,"
    path = folder / "text.txt"
    path.write_text("\n".join("".join(draw.choices(letters, k=80)) for _ in range(rows)) + "\n")
    return path


def context(model: Path, folder: Path, **hints: Any) -> Context:
    return Context(
        models={"model": Location("folder", str(model))},
        texts={"text": Location("file", str(text_file(folder)))},
        hints=Hints(**{"device": "cpu", "batch_tokens": 24, **hints}),
        device=torch.device("cpu"),
    )


def tiny_context(family: str, folder: Path, **hints: Any) -> Context:
    return context(tiny_model(family), folder, **hints)


def commit(artifact: Path) -> Path:
    """Write the record that makes `artifact/payload` readable."""
    (artifact / "record.json").write_text(json.dumps({"files": payload_files(artifact)}))
    return artifact


def calibrated(ctx: Context, folder: Path, *kinds: str, dtype: str = "float32") -> dict[str, Path]:
    """Statistic ▸ committed artifact, all from one request."""
    stages = {}
    for kind in kinds:
        (folder / kind / "payload").mkdir(parents=True)
        stages[kind] = (CalibrateSpec(ModelSpec("model", dtype), CALIBRATION, kind), folder / kind / "payload")
    run_calibrate(stages, ctx)
    return {kind: commit(folder / kind) for kind in kinds}


def calibration_text(ctx: Context, family: str) -> Tensor:
    """Tokens `[S, T]` of `CALIBRATION`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    return datasets.calibration_tokens(ctx.texts["text"], CALIBRATION, tokenizer)


def plain_inputs(family: str, tokens: Tensor) -> dict[str, Tensor]:
    """Inputs `[S, T, K]` of every linear, seen by hooks on transformers' own model, one forward for all sequences."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    seen: dict[str, Tensor] = {}
    for shape in families.linear_shapes(model.config.to_dict()):
        module = linear_view(model, shape.name).module
        module.register_forward_pre_hook(lambda _m, args, n=shape.name, k=shape.cols: seen.update({n: args[0].view(*tokens.shape, k)}))
    with torch.no_grad():
        model(tokens, use_cache=False)
    return seen


def component(name: str, **params: Any) -> Component:
    """In the version of the code at hand; names that it does not know have version 1."""
    known: dict[str, Any] = {**ROUNDINGS, **TUNERS, **TRANSFORMS, **MODEL_TRANSFORMS, **TOOLKIT_METHODS}
    return Component(name, known[name].version if name in known else 1, tuple(sorted(params.items())))


def quantize_spec(
    rounding: str = "rtn",
    *transforms: str | Component,
    weight: WeightScheme = W4,
    propagation: str = "original",
    activation: ActivationScheme | None = None,
    pattern: str = "*",
    feeds: bool = False,
    **params: Any,
) -> QuantizeSpec:
    method = MethodSpec(
        component(rounding, **params),
        tuple(component(t) if isinstance(t, str) else t for t in transforms),
        propagation=propagation,
    )
    feeds = feeds or propagation == "quantized" or activation is not None or rounding in TUNERS
    return QuantizeSpec(
        ModelSpec("model"), (Rule(pattern, method, weight),), calibration=CALIBRATION if feeds else None, activation=activation
    )


def with_calibration(spec: QuantizeSpec) -> QuantizeSpec:
    """The stage may feed text."""
    return replace(spec, calibration=CALIBRATION)


def quantized(ctx: Context, folder: Path, spec: QuantizeSpec, inputs: Mapping[str, Path]) -> tuple[Path, dict[str, Any]]:
    """(committed artifact, summary)."""
    (folder / "payload").mkdir(parents=True)
    summary = run_quantize(spec, inputs, folder / "payload", ctx)
    (folder / "spec.json").write_text(json.dumps({"spec": to_json(spec)}))
    return commit(folder), summary


def model_with_a_dead_expert(folder: Path) -> Path:
    """Mixtral that routes to one expert, and whose second router never chooses expert 2: of the opposite logits of experts 0 and 1
    one is above its zero."""
    shutil.copytree(tiny_model("mixtral"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[next(n for n in tensors if "layers.1." in n and n.endswith("gate.weight"))]
    weight[1], weight[2] = -weight[0], 0.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
