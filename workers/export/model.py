"""A quantized model as exporters see it: its affine linears, and every other tensor with all folds applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.methods.base import StoredTensor
from workers.blocks import linear_view
from workers.context import Context
from workers.errors import InputError
from workers.export.report import ExportError
from workers.recipe import Recipe
from workers.request import Hints, Location
from workers.specs import ModelSpec
from workers.stream import BlockModel, open_blocks


@dataclass(frozen=True)
class QuantizedModel:
    config: Mapping[str, Any]
    """The parsed config.json of the unquantized model."""
    folder: Path
    """Of the unquantized model: its tokenizer and generation settings."""
    linears: Mapping[str, StoredTensor]
    """Module path ▸ weight `[N, K]`."""
    biases: Mapping[str, Tensor]
    """Module path ▸ bias `[N]` of those linears that have one."""
    others: Mapping[str, Tensor]
    """Parameter name ▸ every other parameter, folds applied: linears that were left alone, and a tied head under its own name."""
    methods: tuple[Mapping[str, Any], ...]
    """`MethodSpec` as JSON, of each rule of the quantize stage."""
    tied: bool
    """The head is the embedding."""
    notes: tuple[str, ...] = ()


def open_model(recipe: Recipe, model_folder: Path) -> BlockModel:
    """The recipe's model with blocks on demand, each quantized as it is loaded.

    Raises InputError, and ExportError for a model that is no longer one of its family."""
    online = recipe.changes_the_model()
    if online is not None:
        raise ExportError(f"the recipe has {online}: the model computes what no checkpoint of its family can say; evaluate it with bitgrid")
    location = Location("folder", str(model_folder))
    context = Context({recipe.model_digest: location}, {}, Hints(device="cpu"), torch.device("cpu"))
    opened = open_blocks(context, ModelSpec(recipe.model_digest, recipe.dtype))
    opened.on_load.append(lambda i: recipe.apply(opened.model, f"{opened.structure.blocks}.{i}."))
    return opened


def read_quantized(artifact: Path, model_folder: Path) -> QuantizedModel:
    """Block by block; raises InputError for a model or recipe that cannot be read, CorruptArtifactError."""
    recipe = Recipe(artifact)
    opened = open_model(recipe, model_folder)
    stored = {op["module"]: recipe.stored(op) for op in recipe.replaced()}
    biases: dict[str, Tensor] = {}
    blocks = opened.structure.blocks + "."
    parameters = opened.model.named_parameters(remove_duplicate=False)
    others = {n: p.detach() for n, p in parameters if not n.startswith(blocks)}
    for i in range(opened.structure.count):
        block = opened.load(i)
        views = {opened.structure.path(i, n): linear_view(block, n) for n in opened.structure.linear_names()}
        owned = {id(getattr(v.module, v.parameter)) for path, v in views.items() if path in stored}
        for path, view in views.items():
            if path in stored and view.bias is not None:
                owned.add(id(view.bias))
                biases[path] = view.bias.detach().clone()
        others.update({n: p.detach().clone() for n, p in block.named_parameters(f"{blocks}{i}") if id(p) not in owned})
        opened.release(i)
    tied, notes = head_is_embedding(opened.model), tuple(left_out(recipe))
    return QuantizedModel(opened.checkpoint.config, model_folder, stored, biases, others, _methods(artifact), tied, notes)


def head_is_embedding(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _methods(artifact: Path) -> tuple[Mapping[str, Any], ...]:
    path = artifact / "spec.json"
    try:
        return tuple(rule["method"] for rule in json.loads(path.read_text())["spec"]["rules"])
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{path} does not say how the model was quantized ({e!r}); give the whole folder of a quantize stage") from e


def left_out(recipe: Recipe) -> list[str]:
    """What a checkpoint says nothing of."""
    if any(step["op"] == "activation" for op in recipe.operations for step in op.get("input", ())):
        return ["static activation ranges are left out: the checkpoint quantizes weights only"]
    return []


def as_half(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors as float16, and a note where that changed any. Raises ExportError on overflow."""
    out: dict[str, Tensor] = {}
    worst, changed = 0.0, 0
    for name, given in tensors.items():
        tensor = given.detach()
        half = tensor.to(torch.float16, copy=True).contiguous()
        if not bool(torch.isfinite(half).all()):
            largest = float(tensor.abs().max())
            raise ExportError(f"{name} has values that float16 cannot hold (largest {largest:.3g}, float16 ends at 65504)")
        difference = (half.to(tensor.dtype) - tensor).abs().max()
        if difference > 0:
            changed += 1
            worst = max(worst, float(difference / tensor.abs().max()))
        out[name] = half
    if not changed:
        return out, []
    return out, [f"{changed} tensors were rounded to float16 (largest change {worst:.1e} of a tensor's largest value)"]
