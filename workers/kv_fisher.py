"""The statistic `kv_fisher`: how much the loss depends on each key and value of calibration tokens (KVQuant, section 3.3).

The diagonal of the Fisher information is estimated by the squared gradient of a sequence's summed next-token loss with respect to
the outputs of `k_proj` and `v_proj`; its scale does not matter to a weighted k-means. Of the same sequences as the statistic `kv`,
in the model's dtype, squared in float32. Tensors of one block: `<block>.keys` and `<block>.values`, `[sequences, T, H D]`.

A backward pass needs the whole model, and one sequence's activations, in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.blocks import Taps
from workers.context import Context
from workers.errors import InputError, NumericalError
from workers.specs import ModelSpec
from workers.stream import open_blocks
from workers.structure import Structure

KIND = "kv_fisher"


def squared_gradients(context: Context, spec: ModelSpec, structure: Structure, tokens: Tensor) -> dict[str, Tensor]:
    """Tokens `[S, T]` ▸ tensors of all blocks by name. Raises InputError where the model does not fit
    `hints.memory_bytes`, NumericalError for gradients that are not finite."""
    with context.phase("read"):
        model = _whole(context, spec).requires_grad_(False)
    found: dict[str, list[Tensor]] = {}
    with context.phase("backward"), torch.enable_grad():
        for sequence in torch.split(tokens.to(context.device), 1):
            for name, gradient in _gradients(model, structure, sequence).items():
                found.setdefault(name, []).append(gradient.float().square().cpu())
    out = {name: torch.cat(parts) for name, parts in found.items()}
    for name, x in out.items():
        if not torch.isfinite(x).all():
            raise NumericalError(f"gradients of {name} are not finite; use model.dtype=float32 or bfloat16")
    return out


def _whole(context: Context, spec: ModelSpec) -> nn.Module:
    """Every block loaded, whatever `hints.streamed` says: a backward pass reads the weights of all again."""
    opened = open_blocks(context, spec)
    whole, limit = opened.whole_bytes(), context.hints.memory_bytes
    if limit is not None and whole > limit:
        raise InputError(
            f"{KIND} needs the whole model for its backward pass, {whole} bytes of weights, and hints.memory_bytes={limit}; "
            "raise that, or set kv.fisher=false"
        )
    for i in range(opened.structure.count):
        opened.load(i)
    model: nn.Module = opened.model
    return model


def _gradients(model: Any, structure: Structure, sequence: Tensor) -> dict[str, Tensor]:
    """Of the summed loss of `[1, T]`, `[1, T, H D]` each."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            # Parameters need no gradient, so that the graph starts at the first block's keys and values.
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return outputs[name]

        return hook

    with Taps() as taps:
        for b in range(structure.count):
            path = f"{structure.blocks}.{b}"
            attention = model.get_submodule(f"{path}.{structure.attention}")
            for projection, name in (("k_proj", "keys"), ("v_proj", "values")):
                taps.add(attention.get_submodule(projection).register_forward_hook(keep(f"{path}.{name}")).remove)
        logits = model(input_ids=sequence, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1].float(), sequence[0, 1:], reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    return dict(zip(outputs, gradients, strict=True))
