"""A running model from its checkpoint, and from a quantize artifact's recipe on top of it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from quant.scheme import ActivationScheme, KVScheme
from workers.context import Context
from workers.errors import InputError
from workers.recipe import Recipe
from workers.runtime import Runtime, attach
from workers.specs import ModelSpec
from workers.stream import BlockModel, open_blocks


def load_model(context: Context, model: ModelSpec) -> nn.Module:
    """The unquantized model in eval mode, in the spec's dtype, on the context's device.

    Where `hints.streamed` says so, or the weights exceed `hints.memory_bytes`, blocks are read anew in every forward and
    given up after it: slow, the same numbers. Raises InputError where not even that fits, UnsupportedModel, NumericalError.
    """
    return _finish(open_blocks(context, model), context)


def rebuild(context: Context, model: ModelSpec, artifact: Path) -> nn.Module:
    """The model with a quantize artifact's recipe applied: dense dequantized weights written in place, in the order of the
    recipe. Streamed as `load_model`. Raises InputError for an unknown operation or version, or another model's recipe."""
    recipe = Recipe(artifact)
    if (recipe.model_digest, recipe.dtype) != (model.digest, model.dtype):
        raise InputError(
            f"{artifact} was quantized from model {recipe.model_digest[:12]} in {recipe.dtype}, not {model.digest[:12]} in {model.dtype}"
        )
    opened = open_blocks(context, model)
    recipe.apply_outside(opened.model, opened.structure.blocks)
    opened.on_load.append(lambda i: recipe.apply(opened.model, f"{opened.structure.blocks}.{i}."))
    return _finish(opened, context)


def attach_runtime(model: nn.Module, artifact: Path | None, activation: ActivationScheme | None, kv: KVScheme | None) -> Runtime:
    """Fake-quantize, until `.remove()`, the inputs of every quantized linear (without an artifact: of every linear the
    family's table names) and, after rotary embedding, the keys and values. Static ranges come from the artifact."""
    return attach(model, None if artifact is None else Recipe(artifact), activation, kv)


def _finish(opened: BlockModel, context: Context) -> nn.Module:
    whole = opened.whole_bytes()
    limit = context.hints.memory_bytes
    if context.hints.streamed or (limit is not None and whole > limit):
        context.notes.append(f"streamed block by block: {whole} bytes of weights, {limit if limit is not None else 'any'} allowed")
        opened.stream_in_forward()
    else:
        if context.kept is not None:
            context.kept.make_room(2 * whole)  # for weights, and as much again to run
        with context.phase("read"):
            for i in range(opened.structure.count):
                opened.load(i)
        # What acts on loading holds the model: without it a model that is let go is freed at once.
        opened.on_load.clear()
    model: nn.Module = opened.model
    return model
