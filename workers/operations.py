"""What the quantize stage writes of a block: operations of the recipe, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.methods.base import StoredTensor
from quant.tensors.columns import ColumnsTensor
from workers.capture import Range
from workers.reassemble import input_steps
from workers.recipe import Operation
from workers.rotate import Rotator
from workers.rounding import BlockQuantizer, LinearResult

Made = tuple[list[Operation], dict[str, Tensor]]
"""Operations, and the tensors that they name."""


def block_operations(worker: BlockQuantizer, results: list[LinearResult], ranges: Mapping[str, Range], rotator: Rotator | None) -> Made:
    """Of a block whose linears are rounded."""
    operations: list[Operation] = [] if rotator is None else rotator.block_operations(worker.index)
    tensors: dict[str, Tensor] = {}
    rounded = {r.name: r for r in results}
    linears = [_linear(worker, name, rounded.get(worker.path(name)), ranges, rotator) for name in worker.weights.views]
    for own, named in (_norms(worker, rotator), _routers(worker), *linears):
        operations += own
        tensors |= named
    file = f"tensors_{worker.index:04d}.safetensors"
    return [{**op, "file": file} for op in operations], tensors


def _norms(worker: BlockQuantizer, rotator: Rotator | None) -> Made:
    operations: list[Operation] = []
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys([*(() if rotator is None else rotator.norms), *worker.weights.norms]):
        path = worker.path(name)
        names = {k: f"{path}.{k}" for k in worker.weights.norms.get(name, ())}
        module: Any = worker.block.get_submodule(name)
        tensors.update({names[k]: getattr(module, k) for k in names})
        kind = {} if rotator is None else rotator.norm_operation(name)
        operations.append({"op": "set_norm", "module": path, "tensors": names, **kind})
    return operations, tensors


def _routers(worker: BlockQuantizer) -> Made:
    tensors: dict[str, Tensor] = {
        f"{worker.path(name)}.weight": worker.block.get_parameter(f"{name}.weight") for name in worker.weights.routers
    }
    return [{"op": "dense", "module": n.removesuffix(".weight"), "tensor": n} for n in tensors], tensors


def _linear(worker: BlockQuantizer, name: str, rounded: LinearResult | None, ranges: Mapping[str, Range], rotator: Rotator | None) -> Made:
    """Of a linear that is rounded, or whose weight transforms have changed; no operation of one that is as it was."""
    weights, view, path = worker.weights, worker.weights.views[name], worker.path(name)
    steps = [] if rotator is None else rotator.input_steps(name)
    more, tensors = input_steps(worker, name)
    steps += more
    bias, held = None, view.bias
    if held is not None and (name in weights.biases or rotator is not None):
        bias, tensors[f"{path}.bias"] = f"{path}.bias", held
    changed = _outputs(worker, name, rotator)
    if rounded is not None:
        stored = rounded.rounded.tensor
        packed = stored.pack()
        tensors.update({f"{path}.{k}": t for k, t in packed.items()})
        if worker.site(name) in ranges:
            steps.append({"op": "activation", **_static_range(ranges[worker.site(name)], stored)})
        operation = {
            "op": "replace_linear",
            "module": path,
            "format": stored.format,
            "meta": stored.meta(),
            "tensors": {k: f"{path}.{k}" for k in packed},
            "bias": bias,
            "input": steps,
            **changed,
        }
        return [operation], tensors
    if rotator is not None or weights.current[name] is not weights.original[name]:
        tensors[f"{path}.weight"] = view.weight()
        dense = {"op": "dense", "module": path, "linear": True, "tensor": f"{path}.weight", "bias": bias, **changed}
        return [{**dense, "input": steps} if steps else dense], tensors
    return [], tensors


def _outputs(worker: BlockQuantizer, name: str, rotator: Rotator | None) -> dict[str, list[str]]:
    """What transforms did to what the linear gives, besides rounding."""
    done = ["rotated"] if rotator is not None and name == rotator.sites.value else []
    done += ["scaled"] if name in worker.weights.rows else []
    return {"outputs": done} if done else {}


def _static_range(found: Range, stored: StoredTensor) -> dict[str, float]:
    """Least and greatest of the inputs that are quantized."""
    low, high = found
    if isinstance(stored, ColumnsTensor) and stored.exact_inputs:
        quantized = torch.ones_like(low, dtype=torch.bool).index_fill(0, stored.kept.to(low.device), False)
        low, high = low[quantized], high[quantized]
    return {"low": float(low.min()), "high": float(high.max())}
