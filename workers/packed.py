"""A rebuilt model whose linears multiply with the packed weights themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels import kernel
from quant.kernels.products import MOST_ROWS
from quant.tensors.affine import AffineTensor
from quant.tensors.base import Stored
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from workers.blocks import linear_view
from workers.errors import InputError
from workers.recipe import Operation, Recipe

OPERATIONS: dict[type[Stored], str] = {AffineTensor: "wq_gemv", CodebookTensor: "lut_gemv", BinaryTensor: "binary_gemv"}
"""Stored format ▸ the kernel that multiplies with it."""
DENSE = "dense"
TYPES = (torch.float32, torch.bfloat16)
"""Of activations that kernels take; others are converted to float32 and back."""


@dataclass
class Packed:
    """What became of the quantized linears of a model."""

    backends: Counter[str] = field(default_factory=Counter)
    """Backend ▸ linears; `dense`: weights dequantized once."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why linears are dense ▸ linears."""
    notes: set[str] = field(default_factory=set)
    """Why a faster kernel was passed over."""
    bytes: int = 0
    """That kernels read of packed weights, all linears together."""


def pack_linears(model: nn.Module, recipe: Recipe, backend: str, device: torch.device) -> Packed:
    """Replace the dense weights of `model`, rebuilt from `recipe`, by what the recipe stores, wherever a kernel computes with it.

    backend: auto, dense, or the name of a twin of the kernel, which must then take every linear. Steps and taps on the inputs of a
    linear stay. Raises InputError for a backend that is not known, or does not take a linear.
    """
    made = Packed()
    for op in recipe.replaced():
        reason = "workload.backend=dense" if backend == DENSE else _pack(model, recipe, op, backend, device, made)
        if reason is None:
            continue
        if backend not in ("auto", DENSE):
            raise InputError(f"workload.backend={backend} does not take {op['module']}: {reason}; use auto, which leaves it dense")
        made.backends[DENSE] += 1
        made.reasons[reason] += 1
    return made


def _pack(model: nn.Module, recipe: Recipe, op: Operation, backend: str, device: torch.device, made: Packed) -> str | None:
    """None, or why the linear stays dense."""
    view = linear_view(model, op["module"])
    if not isinstance(view.module, nn.Linear):
        return f"a weight kept as {type(view.module).__name__} has no packed product"
    stored = recipe.stored(op)
    operation = OPERATIONS.get(type(stored))
    if operation is None:
        return f"the stored format {op['format']} has no packed product"
    try:
        chosen = kernel(operation, backend, device)
        packed = chosen.run.prepare(stored)
    except (ValueError, RuntimeError) as e:
        return str(e)
    _replace(view.module, getattr(chosen.run, operation), packed)
    made.backends[chosen.backend] += 1
    made.notes.update(chosen.notes)
    made.bytes += sum(t.numel() * t.element_size() for t in stored.pack().values()) if packed is stored else packed.bytes
    return None


def _replace(linear: nn.Linear, product: Any, packed: Any) -> None:
    """Give up the dense weight. The module stays, and with it its hooks."""
    width, bias = linear.in_features, linear.bias
    linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, width)
        kind = x.dtype if x.dtype in TYPES else torch.float32
        parts = [product(part.to(kind).contiguous(), packed) for part in rows.split(MOST_ROWS)]
        out = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    linear.forward = forward  # type: ignore[method-assign]
