"""The quantize stage: weights straight from the checkpoint shards, block by block.

With propagation=original the statistics come from calibrate artifacts and no text is fed. With propagation=quantized
(GPTQ's own order, arXiv 2210.17323) calibration text is fed through the already quantized blocks and statistics are collected
here. Static activation ranges are those of the final, quantized blocks: each block is run once more after its linears are
replaced, and what it puts out feeds the next one.

Another toolkit's codes (`workers.toolkits`) are made before the walk, which then only stores them.

A tuner (`workers.tuning`) quantizes linears after the transforms, on text of its own.

Payload: `recipe.json`, `tensors_0000.safetensors` ... (one per block), `layers.parquet`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quant.replay import replaying
from quant.statistics import Statistics
from workers import families
from workers.aside import aside, join, moment
from workers.calibrate import calibration_tokens
from workers.capture import Range
from workers.context import Context
from workers.errors import InputError, WorkerError
from workers.feeding import FedStatistics, OriginalStatistics, statistics_source
from workers.fold import BlockWeights
from workers.layers import Layers
from workers.memory import PeakMemory
from workers.operations import block_operations
from workers.reassemble import input_bits
from workers.recipe import Operation, RecipeWriter
from workers.rotate import Rotator
from workers.rotation import rotate_outside
from workers.rounding import (
    BlockQuantizer,
    LinearResult,
    Method,
    check_shapes,
    make_methods,
    merge,
    method_for,
    toolkit_of,
)
from workers.scaling import GroupForward
from workers.sensitivity import note_budget, with_chosen_bits
from workers.sites import round_block, round_site
from workers.specs import QuantizeSpec
from workers.stream import BlockModel, open_blocks
from workers.structure import LinearShape, Structure
from workers.toolkits.launch import made_by_toolkit, without_toolkit
from workers.tuning import Tuning, tuner_of

NO_RULE = "no rule names it"


def run_quantize(spec: QuantizeSpec, inputs: Mapping[str, Path], payload: Path, context: Context) -> dict[str, Any]:
    """inputs: statistic name ▸ artifact folder of its calibrate stage; payload: existing empty folder. Returns the summary.

    Raises InputError (model, statistics or group size that do not fit), NumericalError, CorruptArtifactError.
    """
    auto, chosen = spec.auto, dict[str, Any]()
    if auto is not None:
        if "sensitivity" not in inputs:
            raise InputError("automatic bits need a sensitivity table as the input `sensitivity`")
        spec, chosen = with_chosen_bits(spec, auto, inputs["sensitivity"])
        inputs = {role: path for role, path in inputs.items() if role != "sensitivity"}
    model = open_blocks(context, spec.model)
    try:
        summary = _quantize(spec, inputs, payload, context, model)
        if auto is None:
            return summary
        note_budget(context, auto.budget, chosen["bits_stored"], summary["bits_stored"])
        return {**summary, "auto": chosen}
    finally:
        model.on_load.clear()  # a rotator there holds the model, which would stay until the garbage collector comes by


def _quantize(spec: QuantizeSpec, inputs: Mapping[str, Path], payload: Path, context: Context, model: BlockModel) -> dict[str, Any]:
    """With codes of our own, or with those that another toolkit makes first."""
    made = make_methods(spec.rules)
    if toolkit_of(made) is None:
        return quantize_blocks(spec, inputs, payload, context, model, model.release)
    with made_by_toolkit(spec, made, payload, context, model) as toolkit:
        own = without_toolkit(spec)
        return toolkit.add_to(quantize_blocks(own, inputs, payload, context, model, model.release, toolkit.methods))


def quantize_blocks(
    spec: QuantizeSpec,
    inputs: Mapping[str, Path],
    payload: Path,
    context: Context,
    model: BlockModel,
    done: Callable[[int], None],
    made: tuple[Method, ...] | None = None,
) -> dict[str, Any]:
    """As `run_quantize`, on an opened model; `done(i)` is called when block i is written and no longer needed. `made`: the methods of
    the rules, where they are not to be made from the spec."""
    peak = PeakMemory(context.device, context.kept)
    if spec.seed is not None:
        torch.manual_seed(spec.seed)
    made = made or make_methods(spec.rules)
    shapes = families.linear_shapes(model.checkpoint.config)
    check_shapes(shapes, made, model.structure.model_type)
    writer, layers = RecipeWriter(payload, spec.model.digest, spec.model.dtype), Layers({s.name: s for s in shapes})
    try:
        rotator = rotate_outside(spec, made, model, context, writer)
        source = statistics_source(spec, made, inputs, context, model, rotator)
        tuning = _tuning(spec, made, source, context, model)
        width = 1 if tuning is None else tuning.tuner.blocks
        run = _Run(spec, made, model, source, context, writer, layers, rotator, tuning)
        with replaying() if context.device.type == "cuda" else nullcontext():
            for first in range(0, model.structure.count, width):
                indices = range(first, min(first + width, model.structure.count))
                run.blocks(indices)
                for b in indices:
                    done(b)
        with context.phase("write"):
            writer.close()
    finally:
        writer.stop()
    layers.write(payload / "layers.parquet")
    _check_coverage(shapes, made, run.replaced, run.kept)
    _note_left_alone(context, run.left_alone)
    context.notes += [f"{n}: {note}" for n, note in layers.notes()]
    return {
        **layers.summary(),
        "model_bytes": writer.bytes + _untouched_bytes(model, writer.operations),
        "coverage": {"asked": len(run.replaced), "quantized": len(run.replaced), "kept": run.kept},
        "peak_memory_bytes": peak.bytes(),
        "working_set": {
            "declared": _working_set(made, width),
            "block_bytes": max(model.block_bytes(i) for i in range(model.structure.count)),
        },
        "flags": _flags(made, run.worked) + layers.flags(),
        **({"rotation": rotator.rotation.details} if rotator is not None and rotator.rotation.details else {}),
        **({"reassembly": run.reassembled} if run.reassembled else {}),
        **({} if tuning is None else {"tuning": tuning.losses}),
    }


def _working_set(made: tuple[Method, ...], width: int) -> str:
    if any(m.whole is not None and m.whole.working_set == "model" for m in made):
        return "model"
    return "block" if width == 1 else f"blocks({width})"


@dataclass
class _Run:
    """What lasts from block to block. A block's own tensors are locals of `blocks`, so that one block at a time is in memory."""

    spec: QuantizeSpec
    made: tuple[Method, ...]
    model: BlockModel
    source: OriginalStatistics | FedStatistics
    context: Context
    writer: RecipeWriter
    layers: Layers
    rotator: Rotator | None = None
    tuning: Tuning | None = None
    left_alone: dict[tuple[str, str, str], int] = field(default_factory=dict)
    worked: set[str] = field(default_factory=set)
    kept: list[dict[str, str]] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    reassembled: list[dict[str, Any]] = field(default_factory=list)

    def blocks(self, indices: range) -> None:
        """Read, quantize and write blocks: one, or as many as a tuner takes together."""
        for b in indices:
            with self.context.phase("read"):
                self.model.load(b)
        if indices.stop < self.model.structure.count:
            self.model.prefetch(indices.stop)
        if self.tuning is not None:
            self.tuning.open(indices)
        if len(indices) == 1 and self._can_pause(indices[0]):
            self._with_pauses(indices[0])
            return
        workers, results = [], []
        for b in indices:
            workers.append(self._transformed(b))
            results.append(round_block(workers[-1], self.source, self.context))
        if self.tuning is not None:
            self.tuning.tune(workers)
            self.tuning.advance(workers)
        for worker, rounded in zip(workers, results, strict=True):
            self._finish(worker, [*rounded, *worker.tuned])

    def _can_pause(self, b: int) -> bool:
        """Whether one forward of the block serves all its sites: nothing but rounding, in true-sequential order, on fed text."""
        source = self.source
        if not isinstance(source, FedStatistics) or self.rotator is not None or self._structure.experts is not None:
            return False
        methods = self._methods(b).values()
        alone = all(m.tuner is None and not m.transforms for m in methods) and any(m.sequential for m in methods)
        return alone and source.can_pause(static=self._static)

    @property
    def _structure(self) -> Structure:
        return self.model.structure if self.rotator is None else self.rotator.structure

    def _methods(self, b: int) -> dict[str, Method]:
        """Of the block's linears that a rule names."""
        named = {n: method_for(self.made, self._structure.path(b, n)) for n in self._structure.linear_names()}
        return {n: m for n, m in named.items() if m is not None}

    @property
    def _static(self) -> bool:
        """Whether activations have ranges that are taken from the quantized blocks."""
        return self.spec.activation is not None and not self.spec.activation.dynamic

    def _with_pauses(self, b: int) -> None:
        assert isinstance(self.source, FedStatistics)
        context, worker = self.context, self._worker(b, {}, {})
        sites = {s.linears[0]: s for s in worker.structure.sites if any(n in worker.methods for n in s.linears)}
        forward = self.source.paused(b, {name: site.cols for name, site in sites.items()})
        stops, rounded, done = forward.sites(), dict[str, list[LinearResult]](), None
        while True:
            with context.phase("forward"):
                stop = next(stops, None)
            if stop is None:
                break
            site, found = stop
            statistics, tokens = merge([found])
            worker.statistics = statistics  # one Hessian at a time is in memory, and those whose errors are still found
            worker.tokens.update(tokens)
            rounded[site] = round_site(worker, sites[site], None, context)
            done = moment(context.device)
        self.source.hidden = forward.outputs
        self._write(worker, [r for name in sites for r in rounded[name]], {}, done)

    def _transformed(self, b: int) -> BlockQuantizer:
        with self.context.phase("forward"):
            statistics, tokens = merge(self.source.collect(b, self._structure, None))
        worker = self._worker(b, statistics, tokens)
        with self.context.phase("search"):
            worker.transform()
        self.reassembled += worker.reassembled
        return worker

    def _worker(self, b: int, statistics: dict[str, Statistics], tokens: dict[str, int]) -> BlockQuantizer:
        context, model, structure = self.context, self.model, self._structure
        block = model.load(b)
        weights = BlockWeights(block, structure)
        forward = GroupForward(block, weights, lambda s, t: model.block_calls(s, t)[b], context.batch_tokens, structure.sites[0].cols)
        return BlockQuantizer(
            b,
            block,
            structure,
            self._methods(b),
            weights,
            statistics,
            tokens,
            forward,
            self.left_alone,
            self.worked,
            self.spec.seed or 0,
            self.spec.activation,
        )

    def _finish(self, worker: BlockQuantizer, results: list[LinearResult]) -> None:
        done = moment(self.context.device)
        with self.context.phase("forward"):
            ranges = self.source.advance(worker.index, static=self._static)
        self._write(worker, results, ranges, None if ranges else done)

    def _write(
        self, worker: BlockQuantizer, results: list[LinearResult], ranges: Mapping[str, Range], done: torch.cuda.Event | None
    ) -> None:
        """done: when all but the block's forward was; None: that is to be over, too."""
        b = worker.index
        with self.context.phase("write"), aside(self.context.device, after=done):
            operations, tensors = block_operations(worker, results, ranges, self.rotator)
            self.replaced |= {m.name for m in results}
            for name in worker.structure.linear_names():
                if name not in worker.methods:
                    self.kept.append({"module": worker.path(name), "reason": NO_RULE})
                    operations.append({"op": "keep", **self.kept[-1]})
            self.writer.add_block(f"tensors_{b:04d}.safetensors", operations, tensors)
            self.layers.add(b, results, input_bits(worker))
        join(self.context.device)


def _tuning(
    spec: QuantizeSpec, made: tuple[Method, ...], source: OriginalStatistics | FedStatistics, context: Context, model: BlockModel
) -> Tuning | None:
    """Where a rule names a tuner. Raises InputError where text or statistics are not as it needs them."""
    tuner = tuner_of(made)
    if tuner is None:
        return None
    if spec.calibration is None:
        raise InputError(f"{tuner.name} feeds text: the spec needs a calibration")
    if tuner.blocks > 1 and isinstance(source, FedStatistics):
        raise InputError(
            f"{tuner.name} tunes {tuner.blocks} blocks together, which cannot take statistics block by block from quantized ones; "
            "use propagation=original and dynamic activation ranges, or tune one block at a time"
        )
    tokens = calibration_tokens(context, model, spec.calibration)
    activation = spec.activation if "activation" in tuner.reads else None
    return Tuning(tuner, model, tokens, activation, context)


def _check_coverage(shapes: tuple[LinearShape, ...], made: tuple[Method, ...], replaced: set[str], kept: list[dict[str, str]]) -> None:
    asked = {s.name for s in shapes if method_for(made, s.name) is not None}
    if asked != replaced or {s.name for s in shapes} - asked != {k["module"] for k in kept}:
        raise WorkerError(
            f"coverage: {len(asked)} linears were asked for, {len(replaced)} quantized; "
            f"missing {sorted(asked - replaced)[:3]}, not asked for {sorted(replaced - asked)[:3]}"
        )


def _untouched_bytes(model: BlockModel, operations: list[Operation]) -> int:
    """Bytes of the checkpoint's tensors that no operation replaces, as stored; experts count by their share."""
    replaced: dict[str, float] = {}
    for op in operations:
        if op["op"] not in ("replace_linear", "set_norm", "dense"):
            continue
        parts = [f"{op['module']}.weight"]
        if op["op"] == "set_norm":
            parts = [f"{op['module']}.{k}" for k in (("weight", "bias") if "kind" in op else op["tensors"])]
        if op.get("bias"):
            parts.append(f"{op['module']}.bias")
        for name in parts:
            sources, share = model.sources.get(name, []), 1.0
            tensor = name.removesuffix(".weight").rpartition(".")[0]
            if not sources and tensor in model.sources:  # one expert of a 3-D tensor
                sources, share = model.sources[tensor], 1.0 / model.model.get_parameter(tensor).shape[0]
            for source in sources:
                replaced[source] = replaced.get(source, 0.0) + share
    left: dict[tuple[Path, str], float] = {}  # in pickled weights two names may share a tensor, of which the larger part is left
    for name, entry in model.checkpoint.tensors.items():
        part = entry.bytes * (1 - replaced.get(name, 0.0))
        left[entry.file, entry.name] = max(part, left.get((entry.file, entry.name), 0.0))
    return round(sum(left.values()))


def _note_left_alone(context: Context, left_alone: Mapping[tuple[str, str, str], int]) -> None:
    for (transform, group, reason), count in left_alone.items():
        context.notes.append(f"{transform} left group {group} alone in {count} blocks: {reason}")


def _flags(made: tuple[Method, ...], worked: set[str]) -> list[str]:
    names = {t.name for m in made for t in m.transforms}
    return [f"{name} could change nothing in this model" for name in sorted(names - worked)]
