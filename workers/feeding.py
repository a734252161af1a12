"""Where the quantize stage's statistics come from: calibrate artifacts (mapped into a rotated model's terms), text fed through the
rotated model, or text fed through the already quantized blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.statistics import Statistics
from workers.artifact import payload_digest, payload_path
from workers.calibrate import SITES, calibration_tokens
from workers.capture import BlockStatistics, Range, check_kind, collect, run_block, sample_sequences
from workers.context import Context
from workers.datasets import batches
from workers.errors import InputError
from workers.kept import Kept
from workers.memory import free_bytes
from workers.paused import PausedForward, waiting_bytes
from workers.rotate import Rotator
from workers.rounding import Method, missing_statistics
from workers.specs import QuantizeSpec
from workers.stream import BlockModel, Call
from workers.structure import Structure


class StoredStatistics:
    """Calibrate artifacts; nothing is fed."""

    def __init__(self, indices: Mapping[str, tuple[Path, dict[str, Any]]], device: torch.device, keeps: Kept | None = None) -> None:
        """keeps: what holds statistics between stages; None reads them all."""
        self._indices = indices
        self._device = device
        self._keeps = keeps

    def collect(self, block: int, structure: Structure, only: tuple[str, ...] | None) -> list[BlockStatistics]:
        prefix = f"{structure.blocks}.{block}."
        parts = []
        for kind, (folder, index) in self._indices.items():
            described = index["blocks"][block]
            tensors = self._tensors(folder, described["file"])
            sites = {n.removeprefix(prefix): Statistics(**{kind: t}) for n, t in tensors.items()}
            parts.append(BlockStatistics(sites, {n.removeprefix(prefix): s["tokens"] for n, s in described["sites"].items()}))
        return parts

    def _tensors(self, folder: Path, name: str) -> Mapping[str, Tensor]:
        def read() -> dict[str, Tensor]:
            return load_file(payload_path(folder, name), device=str(self._device))

        return read() if self._keeps is None else self._keeps.statistics(payload_digest(folder, name), read)

    def origin(self, block: int) -> str | None:
        """Digest of the file that the block's Hessians come from; None where they are not from one."""
        if "hessian" not in self._indices:
            return None
        folder, index = self._indices["hessian"]
        return payload_digest(folder, index["blocks"][block]["file"])

    def advance(self, block: int, *, static: bool) -> dict[str, Range]:
        return {}


class MappedStatistics:
    """Calibrate artifacts of the unrotated model, in terms of the rotated one. A block is rotated before it is asked for."""

    def __init__(self, stored: StoredStatistics, rotator: Rotator) -> None:
        self._stored, self._rotator = stored, rotator

    def collect(self, block: int, structure: Structure, only: tuple[str, ...] | None) -> list[BlockStatistics]:
        return [self._rotator.mapped(block, part) for part in self._stored.collect(block, structure, only)]

    def origin(self, block: int) -> str | None:
        return self._stored.origin(block)

    def advance(self, block: int, *, static: bool) -> dict[str, Range]:
        return {}


@dataclass
class RecollectedStatistics:
    """Text fed through the unquantized, rotated model: a block passes its outputs on before it is quantized."""

    model: BlockModel
    calls: list[list[Call]]
    """Per batch, per block."""
    hidden: list[Tensor]
    wanted: frozenset[str]
    kept: int

    def collect(self, block: int, structure: Structure, only: tuple[str, ...] | None) -> list[BlockStatistics]:
        calls = [c[block] for c in self.calls]
        found, self.hidden = collect(self.model.blocks[block], structure, self.wanted, calls, self.hidden, self.kept, only)
        return [found]

    def origin(self, block: int) -> str | None:
        return None

    def advance(self, block: int, *, static: bool) -> dict[str, Range]:
        return {}


OriginalStatistics = StoredStatistics | MappedStatistics | RecollectedStatistics
"""Of the unquantized model."""


@dataclass
class FedStatistics:
    """Text fed through the quantized blocks; `kinds` are collected before a block is quantized (none with stored statistics)."""

    model: BlockModel
    calls: list[list[Call]]
    """Per batch, per block."""
    hidden: list[Tensor]
    kinds: frozenset[str]
    kept: int
    notes: list[str]
    """Told of fallbacks."""
    stored: OriginalStatistics | None = None
    keeps: Kept | None = None
    """What gives memory back where it is wanted."""

    def origin(self, block: int) -> str | None:
        return None if self.stored is None else self.stored.origin(block)

    def collect(self, block: int, structure: Structure, only: tuple[str, ...] | None) -> list[BlockStatistics]:
        if self.stored is not None:
            return self.stored.collect(block, structure, only)
        if not self.kinds:
            return []
        module, calls = self.model.blocks[block], self._calls(block)
        return [collect(module, structure, self.kinds, calls, self.hidden, self.kept, only, statistics_alone=True)[0]]

    def can_pause(self, *, static: bool) -> bool:
        """Whether `paused` serves a block: statistics are collected here, no ranges of the quantized block are wanted, and there is memory
        for all batches to wait in. Where there is not is noted."""
        if self.stored is not None or not self.kinds or static:
            return False
        device, structure = self.hidden[0].device, self.model.structure
        needed = waiting_bytes(structure, sum(h.shape[0] * h.shape[1] for h in self.hidden), self.hidden[0].dtype)
        if self.keeps is not None:
            self.keeps.make_room(2 * needed)
        free = free_bytes(device)
        if needed <= free // 2:
            return True
        note = f"every site of a block had a forward of its own: one for all needs {needed} bytes, half of the {free} free ones of {device}"
        if note.partition(":")[0] not in {n.partition(":")[0] for n in self.notes}:
            self.notes.append(note)
        return False

    def paused(self, block: int, widths: Mapping[str, int]) -> PausedForward:
        """Its outputs are to become `hidden`. widths: as PausedForward has it."""
        return PausedForward(self.model.blocks[block], widths, self.kinds, self._calls(block), self.hidden, self.kept)

    def advance(self, block: int, *, static: bool) -> dict[str, Range]:
        module, calls = self.model.blocks[block], self._calls(block)
        if not static:
            if block + 1 < len(self.model.blocks):  # nobody reads what the last one puts out
                self.hidden = run_block(module, calls, self.hidden)
            return {}
        found, self.hidden = collect(module, self.model.structure, frozenset({"range"}), calls, self.hidden, 0)
        return self._with_unreached(block, found.ranges)

    def _calls(self, block: int) -> list[Call]:
        return [c[block] for c in self.calls]

    def _with_unreached(self, block: int, ranges: dict[str, Range]) -> dict[str, Range]:
        """An expert that no token reached gets the ranges of all its siblings together."""
        structure, out = self.model.structure, dict(ranges)
        for name in (s.linears[0] for s in structure.sites):
            if name not in out:
                same = [r for n, r in ranges.items() if n.rpartition(".")[0] == name.rpartition(".")[0]]
                lows, highs = (torch.stack(parts) for parts in zip(*same, strict=True))
                out[name] = (lows.amin(0), highs.amax(0))
                self.notes.append(f"no calibration token reached {structure.path(block, name)}; its static range is that of its siblings")
        return out


def statistics_source(
    spec: QuantizeSpec,
    made: tuple[Method, ...],
    inputs: Mapping[str, Path],
    context: Context,
    model: BlockModel,
    rotator: Rotator | None = None,
) -> OriginalStatistics | FedStatistics:
    """`model` with what is outside its blocks rotated already, where there is a rotator."""
    modes = {r.method.propagation for r in spec.rules}
    if not modes <= {"original", "quantized"}:
        raise InputError(f"propagation={sorted(modes - {'original', 'quantized'})}; allowed: original, quantized")
    quantized = "quantized" in modes
    if len(modes) > 1:
        raise InputError("all rules of one quantize stage need the same propagation; use original or quantized for every rule")
    static = spec.activation is not None and not spec.activation.dynamic
    needs = frozenset[str]().union(*(m.needs for m in made))
    recollect = None if quantized or rotator is None else rotator.recollects(needs)
    stored: OriginalStatistics | None = None
    if not quantized and recollect is None:
        stored = _stored(made, inputs, context, model)
        if rotator is not None:
            stored = MappedStatistics(stored, rotator)
        if not static:
            return stored
    if spec.calibration is None:
        why = f"statistics of the rotated model are collected here: {recollect}" if recollect else "propagation=quantized and static ranges"
        raise InputError(f"{why}; the stage feeds text, and the spec needs a calibration")
    tokens = calibration_tokens(context, model, spec.calibration)
    kept = sample_sequences(*tokens.shape)
    with context.phase("forward"):
        prepared = model.prepare(batches(tokens, context.batch_tokens))
    if recollect is not None:
        context.notes.append(f"statistics of the rotated model were collected in this stage: {recollect}")
        stored = RecollectedStatistics(model, prepared.calls, list(prepared.hidden), needs, kept)
        if not static:
            return stored
    return FedStatistics(
        model, prepared.calls, prepared.hidden, needs if quantized else frozenset(), kept, context.notes, stored, context.kept
    )


def _stored(made: tuple[Method, ...], inputs: Mapping[str, Path], context: Context, model: BlockModel) -> StoredStatistics:
    missing = missing_statistics(made, frozenset(inputs))
    if missing:
        raise InputError(f"the methods need the statistics {', '.join(missing)}; given: {', '.join(sorted(inputs)) or 'none'}")
    indices = {check_kind(kind): (folder, json.loads(payload_path(folder, SITES).read_text())) for kind, folder in inputs.items()}
    stored = StoredStatistics(indices, context.device, context.kept)
    _check_sites(stored, model)
    return stored


def _check_sites(stored: StoredStatistics, model: BlockModel) -> None:
    for kind, (folder, index) in stored._indices.items():
        if len(index["blocks"]) != model.structure.count:
            raise InputError(f"statistic {kind} in {folder} is of a model with {len(index['blocks'])} blocks, not {model.structure.count}")
