"""The recipe: the contract between quantize and everything that runs, measures or exports its result.

`recipe.json` holds a version, the base model's digest and dtype, and ordered operations from a closed set, each with module path,
parameters, and the file and names of its tensors:

- replace_linear{module, format, meta, file, tensors, bias, input}: the weight becomes `quant.tensors.unpack(...).dequantize()`;
  bias is the name of a changed (or new) bias, or null; input lists, in order, what is done to the input at run time:
  gather{index [K'], scale [K'] or null} · scale{scale [K]} · hadamard{size, block} · rotation{matrix [K, K']}, x ▸ x M ·
  reassemble{splits [K], sources [r], destinations [r]}, channels split and merged (`quant.reassembly`) ·
  activation{low, high}, a static range per tensor, which comes last. Fake quantization of activations follows all of them.
  outputs (also of a dense linear), where it is there, says what transforms did to what the linear gives: rotated, scaled.
- set_norm{module, file, tensors, kind?, eps?}: weight (and bias) of a norm. With kind rms the norm has no bias and, but for
  what `tensors` names, no scale: x / sqrt(mean(x²) + eps), whatever it was.
- dense{module, file, tensor, linear?, bias?, input?, outputs?}: an unquantized weight that differs from the checkpoint's: a scaled router,
  an embedding, the head, or (linear) a linear of a block.
- heads_hadamard{module, heads, block}: a Hadamard matrix across every `block` heads of the input of the linear `module`.
- rotate_qk_after_rope{module, block}: queries and keys of the attention `module` are mixed, `block` channels of a head at a time,
  before keys are quantized. Their products do not change, so that nothing is done where keys stay as they are.
- untie_head{module}: the head gets a copy of the embedding's weight, which later operations may change.
- keep{module, reason}: a linear left as it is.

Operations on modules inside a block are carried out when the block is read; all others once, when the model is opened, and so are
rotations of keys, which whoever makes a cache asks for before any block is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant import tensors as stored_tensors
from quant.accounting import size_bytes
from quant.methods.base import StoredTensor
from workers import steps
from workers.artifact import flush, payload_path
from workers.aside import moment
from workers.blocks import LinearView, linear_view
from workers.errors import InputError

VERSION = 1
RECIPE = "recipe.json"
INPUT_OPERATIONS = (*steps.STEPS, "activation")

Operation = dict[str, Any]
Run = Callable[[nn.Module, Operation, dict[str, Tensor]], None]
"""Carries an operation out on a model, with the tensors of the operation's file."""


class RecipeWriter:
    """Collects operations and writes tensors block by block, in a thread of its own: while a block is written the next one is worked on.
    To be closed, or stopped where the stage fails."""

    def __init__(self, payload: Path, model_digest: str, dtype: str) -> None:
        self._payload = payload
        self._head = {"version": VERSION, "model": model_digest, "dtype": dtype}
        self._thread = ThreadPoolExecutor(1, "recipe")
        self._writing: Future[None] | None = None
        self.operations: list[Operation] = []
        self.bytes = 0
        """Of all tensors written."""

    def add_block(self, file: str, operations: list[Operation], tensors: dict[str, Tensor]) -> None:
        """The tensors are not to be changed afterwards. Raises what writing the block before raised."""
        self.operations += operations
        self._wait()
        if not tensors:
            return
        self.bytes += size_bytes(*tensors.values())
        given = {k: t.detach() for k, t in tensors.items()}
        self._writing = self._thread.submit(_write_tensors, given, self._payload / file, _made(given))

    def close(self) -> None:
        self._wait()
        self._thread.shutdown()
        (self._payload / RECIPE).write_text(json.dumps({**self._head, "operations": self.operations}, indent=1))

    def stop(self) -> None:
        """Nothing is written any more when it returns."""
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _made(tensors: dict[str, Tensor]) -> torch.cuda.Event | None:
    """Of the moment when tensors on a GPU are there."""
    device = next((t.device for t in tensors.values() if t.is_cuda), None)
    return None if device is None else moment(device)


def _write_tensors(tensors: dict[str, Tensor], path: Path, made: torch.cuda.Event | None) -> None:
    with torch.cuda.stream(None if made is None else torch.cuda.Stream(next(t.device for t in tensors.values() if t.is_cuda))):
        if made is not None:
            torch.cuda.current_stream().wait_event(made)
        kept = {k: t.to("cpu").contiguous() for k, t in tensors.items()}
    save_file(kept, path)
    flush(path)  # now, so that the commit need not wait for the disk


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

    def apply(self, model: nn.Module, below: str = "", replace: Run | None = None) -> None:
        """Carry out the operations on modules whose path starts with `below`, in order, in place. replace: what carries out
        replace_linear; None: `replace_linear` of this module."""
        known = OPERATIONS if replace is None else {**OPERATIONS, "replace_linear": replace}
        for op in self.operations:
            if op["module"].startswith(below):
                known[op["op"]](model, op, self._tensors(op))

    def apply_outside(self, model: nn.Module, blocks: str) -> None:
        """Carry out the operations on modules that are not below `blocks`: embeddings, final norm, head; and rotations of keys."""
        for op in self.operations:
            if op["op"] == "rotate_qk_after_rope" or not op["module"].startswith(blocks + "."):
                OPERATIONS[op["op"]](model, op, self._tensors(op))

    def changes_the_model(self) -> str | None:
        """An operation that an ordinary checkpoint of the family cannot hold; None where there is none."""
        for op in self.operations:
            if op["op"] in RUNTIME or "kind" in op:
                return str(op["op"])
            step = next((s["op"] for s in op.get("input", ()) if s["op"] != "activation"), None)
            if step is not None:
                return str(step)
        return None

    def replaced(self) -> list[Operation]:
        return [op for op in self.operations if op["op"] == "replace_linear"]

    def exact_inputs(self, op: Operation) -> Tensor | None:
        """int64 `[r]`: inputs of a replace_linear operation that stay in full precision where activations are quantized."""
        return self._tensors(op)[op["tensors"]["kept"]].long() if op["meta"].get("exact_inputs") else None

    def stored(self, op: Operation, device: torch.device | str = "cpu") -> StoredTensor:
        """The packed weight of a replace_linear operation."""
        tensors = self._tensors(op)
        return _stored(op, {name: tensors[name].to(device) for name in op["tensors"].values()})

    def _tensors(self, op: Operation) -> dict[str, Tensor]:
        file = op.get("file")
        if file is None:
            return {}
        if self._open[0] != file:
            self._open = (file, load_file(payload_path(self.artifact, file)))
        return self._open[1]


def check_operation(op: Operation) -> None:
    """Raises InputError for an operation, a step on an input or a kind of norm that is not known here."""
    if op.get("op") not in OPERATIONS:
        raise InputError(f"unknown recipe operation {op.get('op')!r}; this version knows {', '.join(OPERATIONS)}")
    given = [step.get("op") for step in op.get("input", ())]
    for name in given:
        if name not in INPUT_OPERATIONS:
            raise InputError(f"unknown input operation {name!r}; this version knows {', '.join(INPUT_OPERATIONS)}")
    if "activation" in given[:-1]:
        raise InputError(f"input operations {', '.join(given)} of {op['module']}: activation must come last")
    if op.get("kind", NORM_KINDS[0]) not in NORM_KINDS:
        raise InputError(f"unknown kind of norm {op['kind']!r}; this version knows {', '.join(NORM_KINDS)}")


def _stored(op: Operation, tensors: dict[str, Tensor]) -> StoredTensor:
    return stored_tensors.unpack(op["format"], {k: tensors[n] for k, n in op["tensors"].items()}, op["meta"])


def replace_linear(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    """With the weight dequantized on its device, in the memory of the one that it replaces."""
    view = linear_view(model, op["module"])
    view.write(_stored(op, {n: tensors[n].to(view.storage.device) for n in op["tensors"].values()}).dequantize())
    bias_and_steps(view, op, tensors)


def bias_and_steps(view: LinearView, op: Operation, tensors: dict[str, Tensor]) -> None:
    """What an operation on a linear changes besides its weight."""
    if op.get("bias") is not None:
        steps.write_bias(view.module, tensors[op["bias"]])
    steps.set_linear_steps(view, op.get("input", []), tensors)


def _set_norm(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    module = model.get_submodule(op["module"])
    if op.get("kind") == "rms":
        steps.set_rms_norm(module, op["eps"])
    with torch.no_grad():
        for parameter, name in op["tensors"].items():
            getattr(module, parameter).copy_(tensors[name])


def _dense(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    if op.get("linear"):
        view = linear_view(model, op["module"])
        view.write(tensors[op["tensor"]])
        bias_and_steps(view, op, tensors)
        return
    module: Any = model.get_submodule(op["module"])
    with torch.no_grad():
        module.weight.copy_(tensors[op["tensor"]])
    if op.get("bias") is not None:
        steps.write_bias(module, tensors[op["bias"]])


def _keep(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    linear_view(model, op["module"])  # raises where the module is not there


def _heads_hadamard(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    heads, block = int(op["heads"]), int(op["block"])
    steps.set_steps(model.get_submodule(op["module"]), "heads", [steps.Step(lambda x: steps.mix_heads(x, heads, block))])


def _rotate_qk(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    steps.set_key_rotation(model.get_submodule(op["module"]), int(op["block"]))


def _untie_head(model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
    steps.untie_head(model, op["module"])


OPERATIONS: dict[str, Run] = {
    "replace_linear": replace_linear,
    "set_norm": _set_norm,
    "dense": _dense,
    "heads_hadamard": _heads_hadamard,
    "rotate_qk_after_rope": _rotate_qk,
    "untie_head": _untie_head,
    "keep": _keep,
}
RUNTIME = ("heads_hadamard", "rotate_qk_after_rope", "untie_head")
NORM_KINDS = ("own", "rms")
"""own: as the family's module computes it."""
