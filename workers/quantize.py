"""The quantize stage: weights straight from the checkpoint shards, block by block.

With propagation=original the statistics come from calibrate artifacts and no text is fed. With propagation=quantized
(GPTQ's own order, methods.md §1.3) calibration text is fed through the already quantized blocks and statistics are collected
here. Static activation ranges are those of the final, quantized blocks: each block is run once more after its linears are
replaced, and what it puts out feeds the next one.

Payload: `recipe.json`, `tensors_0000.safetensors` ... (one per block), `layers.parquet`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.statistics import Statistics
from workers import families
from workers.artifact import payload_path
from workers.calibrate import SITES, calibration_tokens
from workers.capture import BlockStatistics, check_kind, collect, run_block, sample_sequences
from workers.context import Context
from workers.errors import InputError, WorkerError
from workers.fold import BlockWeights
from workers.layers import Layers
from workers.memory import PeakMemory
from workers.recipe import Operation, RecipeWriter
from workers.rounding import (
    BlockQuantizer,
    LinearResult,
    Method,
    check_shapes,
    make_methods,
    merge,
    method_for,
    missing_statistics,
)
from workers.scaling import GroupForward
from workers.specs import QuantizeSpec
from workers.stream import BlockModel, Prepared, batches, open_blocks

NO_RULE = "no rule names it"


def run_quantize(spec: QuantizeSpec, inputs: Mapping[str, Path], payload: Path, context: Context) -> dict[str, Any]:
    """inputs: statistic name ▸ artifact folder of its calibrate stage; payload: existing empty folder. Returns the summary.

    Raises InputError (model, statistics or group size that do not fit), NumericalError, CorruptArtifactError.
    """
    model = open_blocks(context, spec.model)
    return quantize_blocks(spec, inputs, payload, context, model, model.release)


def quantize_blocks(
    spec: QuantizeSpec,
    inputs: Mapping[str, Path],
    payload: Path,
    context: Context,
    model: BlockModel,
    done: Callable[[int], None],
) -> dict[str, Any]:
    """As `run_quantize`, on an opened model; `done(i)` is called when block i is written and no longer needed."""
    peak = PeakMemory(context.device)
    if spec.seed is not None:
        torch.manual_seed(spec.seed)
    made = make_methods(spec.rules)
    shapes = families.linear_shapes(model.checkpoint.config)
    check_shapes(shapes, made)
    source = _statistics_source(spec, made, inputs, context, model)
    writer = RecipeWriter(payload, spec.model.digest, spec.model.dtype)
    layers = Layers({s.name: s for s in shapes})
    left_alone: dict[tuple[str, str, str], int] = {}
    kept: list[dict[str, str]] = []
    replaced: set[str] = set()
    for b in range(model.structure.count):
        with context.phase("read"):
            block = model.load(b)
        named = {n: method_for(made, model.structure.path(b, n)) for n in model.structure.linear_names()}
        chosen = {n: m for n, m in named.items() if m is not None}
        with context.phase("forward"):
            statistics, tokens = merge(source.collect(b, model.structure, None))
        weights = BlockWeights(block, model.structure)
        forward = GroupForward(
            block, weights, lambda s, t, b=b: model.block_calls(s, t)[b], context.hints.batch_tokens, model.structure.sites[0].cols
        )
        worker = BlockQuantizer(b, block, model.structure, chosen, weights, statistics, tokens, forward, left_alone)
        with context.phase("search"):
            worker.transform()
        results = _round(worker, source, context)
        with context.phase("forward"):
            ranges = source.advance(b, static=spec.activation is not None and not spec.activation.dynamic)
        with context.phase("write"):
            operations, tensors = _operations(worker, results, ranges)
            replaced |= {m.name for m in results}
            for name in named:
                if name not in chosen:
                    kept.append({"module": worker.path(name), "reason": NO_RULE})
                    operations.append({"op": "keep", **kept[-1]})
            writer.add_block(f"tensors_{b:04d}.safetensors", operations, tensors)
            layers.add(b, results)
        done(b)
    writer.close()
    layers.write(payload / "layers.parquet")
    _check_coverage(shapes, made, replaced, kept)
    _note_left_alone(context, left_alone)
    context.notes += [f"{n}: {note}" for n, note in layers.notes()]
    return {
        **layers.summary(),
        "model_bytes": writer.bytes + _untouched_bytes(model, writer.operations),
        "coverage": {"asked": len(replaced), "quantized": len(replaced), "kept": kept},
        "peak_memory_bytes": peak.bytes(),
        "working_set": {"declared": "block", "block_bytes": max(model.block_bytes(i) for i in range(model.structure.count))},
        "flags": _flags(made, left_alone, model.structure),
    }


# --- where statistics come from -----------------------------------------------------------------------------------


class _Stored:
    """Calibrate artifacts; nothing is fed."""

    def __init__(self, indices: Mapping[str, tuple[Path, dict[str, Any]]], device: torch.device) -> None:
        self._indices = indices
        self._device = device

    def collect(self, block: int, structure: families.Structure, only: tuple[str, ...] | None) -> list[BlockStatistics]:
        prefix = f"{structure.blocks}.{block}."
        parts = []
        for kind, (folder, index) in self._indices.items():
            described = index["blocks"][block]
            tensors = load_file(payload_path(folder, described["file"]), device=str(self._device))
            sites = {n.removeprefix(prefix): Statistics(**{kind: t}) for n, t in tensors.items()}
            parts.append(BlockStatistics(sites, {n.removeprefix(prefix): s["tokens"] for n, s in described["sites"].items()}))
        return parts

    def advance(self, block: int, *, static: bool) -> dict[str, tuple[float, float]]:
        return {}


@dataclass
class _Fed:
    """Text fed through the quantized blocks; `kinds` are collected before a block is quantized (none with stored statistics)."""

    model: BlockModel
    prepared: Prepared
    hidden: list[Tensor]
    kinds: frozenset[str]
    kept: int
    stored: _Stored | None = None

    def collect(self, block: int, structure: families.Structure, only: tuple[str, ...] | None) -> list[BlockStatistics]:
        if self.stored is not None:
            return self.stored.collect(block, structure, only)
        if not self.kinds:
            return []
        return [collect(self.model.blocks[block], structure, self.kinds, self._calls(block), self.hidden, self.kept, only)[0]]

    def advance(self, block: int, *, static: bool) -> dict[str, tuple[float, float]]:
        module, calls = self.model.blocks[block], self._calls(block)
        if not static:
            self.hidden = run_block(module, calls, self.hidden)
            return {}
        found, self.hidden = collect(module, self.model.structure, frozenset({"range"}), calls, self.hidden, 0)
        return _with_unreached(found.ranges, self.model.structure)

    def _calls(self, block: int) -> list[Any]:
        return [c[block] for c in self.prepared.calls]


def _with_unreached(ranges: dict[str, tuple[float, float]], structure: families.Structure) -> dict[str, tuple[float, float]]:
    """An expert that no token reached gets the range of all its siblings together."""
    out = dict(ranges)
    for name in (s.linears[0] for s in structure.sites):
        if name not in out:
            same = [r for n, r in ranges.items() if n.rpartition(".")[0] == name.rpartition(".")[0]]
            out[name] = (min(low for low, _ in same), max(high for _, high in same))
    return out


def _statistics_source(
    spec: QuantizeSpec, made: tuple[Method, ...], inputs: Mapping[str, Path], context: Context, model: BlockModel
) -> _Stored | _Fed:
    modes = {r.method.propagation for r in spec.rules}
    if not modes <= {"original", "quantized"}:
        raise InputError(f"propagation={sorted(modes - {'original', 'quantized'})}; allowed: original, quantized")
    quantized = "quantized" in modes
    if len(modes) > 1:
        raise InputError("all rules of one quantize stage need the same propagation; use original or quantized for every rule")
    static = spec.activation is not None and not spec.activation.dynamic
    stored = None
    if not quantized:
        missing = missing_statistics(made, frozenset(inputs))
        if missing:
            raise InputError(f"the methods need the statistics {', '.join(missing)}; given: {', '.join(sorted(inputs)) or 'none'}")
        stored = _Stored({check_kind(k): (p, json.loads(payload_path(p, SITES).read_text())) for k, p in inputs.items()}, context.device)
        _check_sites(stored, model)
        if not static:
            return stored
    if spec.calibration is None:
        raise InputError("propagation=quantized and static activation ranges feed text: the spec needs a calibration")
    tokens = calibration_tokens(context, model, spec.calibration)
    kinds = frozenset().union(*(m.needs for m in made)) if quantized else frozenset[str]()
    with context.phase("forward"):
        prepared = model.prepare(batches(tokens, context.hints.batch_tokens))
    return _Fed(model, prepared, prepared.hidden, kinds, sample_sequences(*tokens.shape), stored)


def _check_sites(stored: _Stored, model: BlockModel) -> None:
    for kind, (folder, index) in stored._indices.items():
        if len(index["blocks"]) != model.structure.count:
            raise InputError(f"statistic {kind} in {folder} is of a model with {len(index['blocks'])} blocks, not {model.structure.count}")


def _round(worker: BlockQuantizer, source: _Stored | _Fed, context: Context) -> list[LinearResult]:
    """All linears at once, or site by site with fresh statistics where a method asks for it and text is fed."""
    sequential = isinstance(source, _Fed) and source.kinds and any(m.sequential for m in worker.methods.values())
    results = []
    for position, site in enumerate(worker.structure.sites):
        names = [n for n in site.linears if n in worker.methods]
        if sequential and position > 0 and names:
            with context.phase("forward"):
                fresh, tokens = merge(source.collect(worker.index, worker.structure, (site.linears[0],)))
            worker.statistics.update(fresh)
            worker.tokens.update(tokens)
        with context.phase("round"):
            results += [worker.round(n) for n in names]
    return results


# --- what is written ----------------------------------------------------------------------------------------------


def _operations(
    worker: BlockQuantizer, results: list[LinearResult], ranges: Mapping[str, tuple[float, float]]
) -> tuple[list[Operation], dict[str, Tensor]]:
    weights = worker.weights
    tensors: dict[str, Tensor] = {}
    operations: list[Operation] = []
    for name, values in weights.norms.items():
        path = worker.path(name)
        names = {k: f"{path}.{k}" for k in values}
        module: Any = worker.block.get_submodule(name)
        tensors.update({names[k]: getattr(module, k) for k in values})
        operations.append({"op": "set_norm", "module": path, "tensors": names})
    for name in weights.routers:
        tensors[f"{worker.path(name)}.weight"] = worker.block.get_submodule(name).weight
        operations.append({"op": "dense", "module": worker.path(name), "tensor": f"{worker.path(name)}.weight"})
    rounded = {r.name: r for r in results}
    for name, view in weights.views.items():
        path = worker.path(name)
        bias = None
        if name in weights.biases:
            bias, tensors[f"{path}.bias"] = f"{path}.bias", view.bias
        if path in rounded:
            stored = rounded[path].rounded.tensor
            packed = stored.pack()
            tensors.update({f"{path}.{k}": t for k, t in packed.items()})
            steps = []
            if worker.site(name) in ranges:
                low, high = ranges[worker.site(name)]
                steps.append({"op": "activation", "low": low, "high": high})
            operations.append(
                {
                    "op": "replace_linear",
                    "module": path,
                    "format": stored.format,
                    "meta": stored.meta(),
                    "tensors": {k: f"{path}.{k}" for k in packed},
                    "bias": bias,
                    "input": steps,
                }
            )
        elif weights.current[name] is not weights.original[name]:
            tensors[f"{path}.weight"] = view.weight()
            operations.append({"op": "dense", "module": path, "linear": True, "tensor": f"{path}.weight", "bias": bias})
    file = f"tensors_{worker.index:04d}.safetensors"
    return [{**op, "file": file} for op in operations], tensors


def _check_coverage(
    shapes: tuple[families.LinearShape, ...], made: tuple[Method, ...], replaced: set[str], kept: list[dict[str, str]]
) -> None:
    asked = {s.name for s in shapes if method_for(made, s.name) is not None}
    if asked != replaced or {s.name for s in shapes} - asked != {k["module"] for k in kept}:
        raise WorkerError(
            f"coverage: {len(asked)} linears were asked for, {len(replaced)} quantized; "
            f"missing {sorted(asked - replaced)[:3]}, not asked for {sorted(replaced - asked)[:3]}"
        )


def _untouched_bytes(model: BlockModel, operations: list[Operation]) -> int:
    """Bytes of the checkpoint's tensors that no operation replaces, as stored; experts count by their share."""
    gone = 0.0
    for op in operations:
        if op["op"] == "keep":
            continue
        parts = [f"{op['module']}.{k}" for k in op.get("tensors", {})] if op["op"] == "set_norm" else [f"{op['module']}.weight"]
        if op.get("bias"):
            parts.append(f"{op['module']}.bias")
        for name in parts:
            sources, share = model.sources.get(name), 1.0
            if sources is None:  # one expert of a 3-D tensor
                tensor = name.removesuffix(".weight").rpartition(".")[0]
                sources, share = model.sources[tensor], 1.0 / model.model.get_parameter(tensor).shape[0]
            gone += share * sum(model.checkpoint.tensors[s].bytes for s in sources)
    return model.checkpoint.bytes - round(gone)


def _note_left_alone(context: Context, left_alone: Mapping[tuple[str, str, str], int]) -> None:
    for (transform, group, reason), count in left_alone.items():
        context.notes.append(f"{transform} left group {group} alone in {count} blocks: {reason}")


def _flags(made: tuple[Method, ...], left_alone: Mapping[tuple[str, str, str], int], structure: families.Structure) -> list[str]:
    names = {t.name for m in made for t in m.transforms}
    groups = {g.name for g in structure.groups}
    return [f"{t} could scale nothing in this model" for t in sorted(names) if {g for n, g, _ in left_alone if n == t} == groups]

