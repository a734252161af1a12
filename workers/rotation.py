"""The rotation of a quantize stage: found (or searched on calibration text), then applied to what is outside the blocks."""

from __future__ import annotations

from quant.methods.base import Linear
from workers.context import Context
from workers.recipe import RecipeWriter
from workers.rotate import Rotator, model_shape, sites_of
from workers.rounding import Method
from workers.specs import QuantizeSpec
from workers.stream import BlockModel

FILE = "tensors_outside.safetensors"


def rotate_outside(
    spec: QuantizeSpec, made: tuple[Method, ...], model: BlockModel, context: Context, writer: RecipeWriter
) -> Rotator | None:
    """Rotate embeddings and head, write them, and have every block rotated when it is read. None where no method rotates.

    Raises UnsupportedModel for a model whose stream cannot be rotated."""
    transform = made[0].whole if made else None
    if transform is None:
        return None
    sites = sites_of(model)
    generator = Linear(transform.name, spec.seed or 0).generator()
    with context.phase("search"):
        rotation = transform.rotation(model_shape(sites, model.structure.count), generator)
    context.notes += [f"{transform.name}: {note}" for note in rotation.notes]
    rotator = Rotator(model, sites, rotation, transform.maps)
    operations, tensors = rotator.install()
    writer.add_block(FILE, [{**op, "file": FILE} for op in operations], tensors)
    return rotator
