"""The recipe: the contract between quantize and everything that runs, measures or exports its result.

`recipe.json` holds a version, the base model's digest and dtype, and ordered operations from a closed set, each with module path,
parameters, and the file and names of its tensors:

- replace_linear{module, format, meta, file, tensors, bias, input}: the weight becomes `quant.tensors.unpack(...).dequantize()`;
  bias is the name of a changed bias, or null; input lists what is done to the input at run time, of `INPUT_OPERATIONS`.
- set_norm{module, file, tensors}: weight (and bias) of a norm.
- dense{module, file, tensor}: an unquantized weight that differs from the checkpoint's (a scaled router).
- keep{module, reason}: a linear left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant import tensors as stored_tensors
from quant.methods.base import StoredTensor
from workers.artifact import payload_path
from workers.blocks import linear_view
from workers.errors import InputError

VERSION = 1
RECIPE = "recipe.json"
INPUT_OPERATIONS = ("activation",)
"""activation{low, high}: static range of the input, per tensor."""

Operation = dict[str, Any]


class RecipeWriter:
    """Collects operations and writes tensors block by block."""

    def __init__(self, payload: Path, model_digest: str, dtype: str) -> None:
        self._payload = payload
        self._head = {"version": VERSION, "model": model_digest, "dtype": dtype}
        self.operations: list[Operation] = []
        self.bytes = 0
        """Of all tensors written."""

    def add_block(self, file: str, operations: list[Operation], tensors: dict[str, Tensor]) -> None:
        kept = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
        if kept:
            save_file(kept, self._payload / file)
        self.bytes += sum(t.numel() * t.element_size() for t in kept.values())
        self.operations += operations

    def close(self) -> None:
        (self._payload / RECIPE).write_text(json.dumps({**self._head, "operations": self.operations}, indent=1))


class Recipe:
    """An artifact's recipe with its tensors at hand. Digests are checked on read; raises InputError for an unknown version."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        data = json.loads(payload_path(artifact, RECIPE).read_text())
        if data.get("version") != VERSION:
            raise InputError(f"recipe version {data.get('version')!r} is not {VERSION}; quantize again with this version of bitgrid")
        self.model_digest: str = data["model"]
        self.dtype: str = data["dtype"]
        self.operations: list[Operation] = data["operations"]
        for op in self.operations:
            check_operation(op)
        self._open: tuple[str, dict[str, Tensor]] = ("", {})

    def apply(self, model: nn.Module, below: str = "") -> None:
        """Carry out the operations on modules whose path starts with `below`, in order, in place."""
        for op in self.operations:
            if op["module"].startswith(below):
                OPERATIONS[op["op"]](model, op, self._tensors(op))

    def replaced(self) -> list[Operation]:
        return [op for op in self.operations if op["op"] == "replace_linear"]

    def stored(self, op: Operation) -> StoredTensor:
        """The packed weight of a replace_linear operation."""
        return _stored(op, self._tensors(op))

    def _tensors(self, op: Operation) -> dict[str, Tensor]:
        file = op.get("file")
        if file is None:
            return {}
        if self._open[0] != file:
            self._open = (file, load_file(payload_path(self.artifact, file)))
        return self._open[1]


def check_operation(op: Operation) -> None:
    if op.get("op") not in OPERATIONS:
        raise InputError(f"unknown recipe operation {op.get('op')!r}; this version knows {', '.join(OPERATIONS)}")
    for step in op.get("input", ()):
        if step.get("op") not in INPUT_OPERATIONS:
            raise InputError(f"unknown input operation {step.get('op')!r}; this version knows {', '.join(INPUT_OPERATIONS)}")


def _stored(op: Operation, tensors: dict[str, Tensor]) -> StoredTensor:
    return stored_tensors.unpack(op["format"], {k: tensors[n] for k, n in op["tensors"].items()}, op["meta"])


def _replace_linear(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    view = linear_view(model, op["module"])
    view.write(_stored(op, tensors).dequantize())
    if op["bias"] is not None:
        view.write_bias(tensors[op["bias"]])


def _set_norm(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    module = model.get_submodule(op["module"])
    with torch.no_grad():
        for parameter, name in op["tensors"].items():
            getattr(module, parameter).copy_(tensors[name])


def _dense(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    if op.get("linear"):
        linear_view(model, op["module"]).write(tensors[op["tensor"]])
        if op.get("bias") is not None:
            linear_view(model, op["module"]).write_bias(tensors[op["bias"]])
        return
    module: Any = model.get_submodule(op["module"])
    with torch.no_grad():
        module.weight.copy_(tensors[op["tensor"]])


def _keep(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    linear_view(model, op["module"])  # raises where the module is not there


OPERATIONS: dict[str, Callable[[nn.Module, Operation, dict[str, Tensor]], None]] = {
    "replace_linear": _replace_linear,
    "set_norm": _set_norm,
    "dense": _dense,
    "keep": _keep,
}
