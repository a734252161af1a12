"""A running model from its checkpoint, and from a quantize artifact's recipe on top of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from quant.scheme import ActivationScheme, KVScheme
from workers.blocks import linear_view
from workers.context import Context
from workers.errors import InputError
from workers.packed import ANY_ROWS, Packed, Packer, weights_bytes
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
    opened, recipe = _open(context, model, artifact)
    left = _leave_out(opened, recipe) if left_out_where_replaced(context.device) else []

    def apply(i: int) -> None:
        block = f"{opened.structure.blocks}.{i}."
        for module in left:
            if module.startswith(block):
                linear = opened.model.get_submodule(module)
                linear.weight = nn.Parameter(torch.empty_like(linear.weight, device=context.device), requires_grad=False)
        recipe.apply(opened.model, block)

    opened.on_load.append(apply)
    return _finish(opened, context)


def left_out_where_replaced(device: torch.device) -> bool:
    """Whether weights that a recipe replaces stay unread. Not on a CPU: products of one to some rows round by how far a weight lies from a
    multiple of 16 bytes (MKL), which a file that is mapped to memory says; a GPU's memory has no such places."""
    return device.type != "cpu"


def _leave_out(opened: BlockModel, recipe: Recipe) -> list[str]:
    """Module paths of the linears whose weights are replaced, and read no more; experts in one tensor and transposed weights are."""
    replaced = [op["module"] for op in recipe.replaced() if op["module"].startswith(f"{opened.structure.blocks}.")]
    views = [linear_view(opened.model, module) for module in replaced]
    left = [view.name for view in views if isinstance(view.module, nn.Linear)]
    for module in left:
        opened.leave_out(f"{module}.weight")
    return left


def rebuild_packed(
    context: Context,
    model: ModelSpec,
    artifact: Path,
    backend: str,
    activation: ActivationScheme | None,
    rows: Collection[int] = ANY_ROWS,
) -> tuple[nn.Module, Packed]:
    """As `rebuild`, but that linears multiply with what the recipe stores, wherever a kernel does (`workers.packed`). Their dense weights
    are neither read nor made. Never streamed. rows: as `Packer` has them.

    Raises InputError as `rebuild` and `Packer` do, and where what is on the device after a block exceeds `hints.memory_bytes`."""
    opened, recipe = _open(context, model, artifact)
    packer, limit = Packer(opened.model, recipe, backend, context.device, activation, rows), context.hints.memory_bytes

    def pack(i: int) -> None:
        for parameter in packer.pack(f"{opened.structure.blocks}.{i}."):
            opened.leave_out(parameter)

    def replace(i: int) -> None:
        recipe.apply(opened.model, f"{opened.structure.blocks}.{i}.", packer.replace)
        if limit is not None and weights_bytes(opened.model, packer.made) > limit:
            raise too_large_to_time(limit)

    opened.on_load.append(replace)
    return _read_all(opened, context, pack), packer.finish()


def too_large_to_time(limit: int | None) -> InputError:
    return InputError(
        f"the weights do not fit hints.memory_bytes={limit}, and a model that is streamed is not measured: its time would be the disk's; "
        "raise hints.memory_bytes, or set measure=false"
    )


def _open(context: Context, model: ModelSpec, artifact: Path) -> tuple[BlockModel, Recipe]:
    """With what is outside the blocks as the recipe has it."""
    recipe = Recipe(artifact)
    if (recipe.model_digest, recipe.dtype) != (model.digest, model.dtype):
        raise InputError(
            f"{artifact} was quantized from model {recipe.model_digest[:12]} in {recipe.dtype}, not {model.digest[:12]} in {model.dtype}"
        )
    opened = open_blocks(context, model)
    recipe.apply_outside(opened.model, opened.structure.blocks)
    return opened, recipe


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
        model: nn.Module = opened.model
        return model
    return _read_all(opened, context)


def _read_all(opened: BlockModel, context: Context, before: Callable[[int], None] | None = None) -> nn.Module:
    """before: called ahead of every block."""
    if context.kept is not None:
        context.kept.make_room(2 * opened.whole_bytes())  # for weights, and as much again to run
    with context.phase("read"):
        for i in range(opened.structure.count):
            if before is not None:
                before(i)
            opened.load(i)
    # What acts on loading holds the model: without it a model that is let go is freed at once.
    opened.on_load.clear()
    model: nn.Module = opened.model
    return model
