"""The rotation of a quantize stage: found (or searched on calibration text), then applied to what is outside the blocks."""

from __future__ import annotations

from quant.methods.base import Linear, ModelTransform, RotationLoss
from quant.methods.rtn import Rtn
from workers.calibrate import calibration_tokens
from workers.context import Context
from workers.errors import InputError
from workers.recipe import RecipeWriter
from workers.rotate import Rotator, model_shape, sites_of
from workers.rotation_search import Nearest, search_loss, searched
from workers.rounding import Method, method_for
from workers.specs import QuantizeSpec
from workers.stream import BlockModel

FILE = "tensors_outside.safetensors"


def rotate_outside(
    spec: QuantizeSpec, made: tuple[Method, ...], model: BlockModel, context: Context, writer: RecipeWriter
) -> Rotator | None:
    """Rotate embeddings and head, write them, and have every block rotated when it is read. None where no method rotates.

    Raises UnsupportedModel for a model whose stream cannot be rotated, InputError where a search has no text."""
    transform = made[0].whole if made else None
    if transform is None:
        return None
    sites = sites_of(model)
    loss = _loss(spec, made, transform, model, context) if transform.searches else None
    generator = Linear(transform.name, spec.seed or 0).generator()
    with context.phase("search"):
        rotation = transform.rotation(model_shape(sites, model.structure.count), generator, loss)
    del loss  # it holds the whole model
    context.notes += [f"{transform.name}: {note}" for note in rotation.notes]
    rotator = Rotator(model, sites, rotation, transform.maps)
    operations, tensors = rotator.install()
    writer.add_block(FILE, [{**op, "file": FILE} for op in operations], tensors)
    return rotator


def _loss(spec: QuantizeSpec, made: tuple[Method, ...], transform: ModelTransform, model: BlockModel, context: Context) -> RotationLoss:
    if spec.calibration is None:
        raise InputError(f"{transform.name} searches on calibration text; the spec needs a calibration")
    rounds = bool(getattr(transform, "weights", False))
    kv = spec.kv is not None and searched(spec.kv)
    if spec.kv is not None and not kv:
        context.notes.append(f"{transform.name}: the search leaves the cache of kv.kind={spec.kv.kind} in full precision")
    if spec.activation is None and not kv and not rounds:
        context.notes.append(f"{transform.name}: nothing is quantized in the search, so that all rotations are alike; give weights=true")
    if spec.activation is not None and not spec.activation.dynamic:
        context.notes.append(f"{transform.name}: the search takes activation ranges from each sequence, not static ones")
    tokens = calibration_tokens(context, model, spec.calibration)

    def nearest(path: str) -> Nearest | None:
        """On the rule's own grid; roundings without a grid are searched with the scheme's."""
        method = method_for(made, path) if rounds else None
        if method is None:
            return None
        return Nearest(method.scheme, Rtn(getattr(method.by, "grid", None), bool(getattr(method.by, "mse", False))))

    with context.phase("read"):
        return search_loss(spec, context, tokens, nearest)
