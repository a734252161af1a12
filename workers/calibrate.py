"""The calibrate stage: statistics of every linear's input on the unquantized model.

Stages that share a model and a calibration set run together: one forward pass serves all their kinds. The model is walked
block by block (hidden states kept, one block's weights at a time), so memory holds one block and its statistics.

Three kinds are not of inputs alone: `kv` (`workers.kv_capture`), `kv_fisher` (`workers.kv_fisher`, which needs the whole model) and
`moments` (`workers.site_moments`).

Payload of one stage: `block_0000.safetensors` ... with one tensor per distinct input, and `sites.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workers import datasets, kv_capture, kv_fisher, site_moments
from workers.capture import BlockStatistics, block_file, check_kind, collect, sample_sequences
from workers.context import Context
from workers.errors import InputError
from workers.memory import PeakMemory
from workers.positions import positions, refuses_calibration
from workers.request import Location
from workers.specs import CalibrateSpec, CalibrationSpec
from workers.stream import BlockModel, open_blocks
from workers.structure import Structure

FORMAT = 1
SITES = "sites.json"
OF_CACHE = frozenset({kv_capture.KIND, kv_fisher.KIND})


def run_calibrate(stages: Mapping[str, tuple[CalibrateSpec, Path]], context: Context) -> dict[str, dict[str, Any]]:
    """Key ▸ (spec, existing payload folder); all specs differ in `statistic` only. Returns a summary per key.

    Raises InputError (unknown statistic, specs that do not belong together, unusable model or text), NumericalError.
    """
    specs = [spec for spec, _ in stages.values()]
    _check(specs)
    peak = PeakMemory(context.device, context.kept)
    model = open_blocks(context, specs[0].model)
    tokens = calibration_tokens(context, model, specs[0].calibration)
    sequences, length = tokens.shape
    wanted = frozenset(s.statistic for s in specs)
    kinds = wanted - OF_CACHE
    if wanted & OF_CACHE:
        kv_capture.check_family(model.structure)
    table = site_moments.SiteMoments(model.structure) if site_moments.KIND in kinds else None
    kept = sample_sequences(sequences, length)
    described: dict[str, list[dict[str, Any]]] = {key: [] for key in stages}
    fisher = kv_fisher.squared_gradients(context, specs[0].model, model.structure, tokens[:kept]) if kv_fisher.KIND in wanted else {}
    with context.phase("forward"):
        prepared = model.prepare(datasets.batches(tokens, context.batch_tokens))
    hidden, calls = prepared.hidden, prepared.calls
    del prepared  # or the first block's inputs would stay beside every block's
    for b in range(model.structure.count):
        with context.phase("read"):
            block = model.load(b)
        kv = kv_capture.KVSamples(block, model.structure, kept) if kv_capture.KIND in wanted else None
        if table is not None:
            table.watch(block)
        with context.phase("forward"):
            found, hidden = collect(block, model.structure, kinds, [c[b] for c in calls], hidden, kept)
            if table is not None:
                table.add(b, block, found)
        model.release(b)
        _note_unused(context, model.structure, b, found)
        with context.phase("write"):
            for key, (spec, payload) in stages.items():
                if spec.statistic == kv_capture.KIND:
                    assert kv is not None
                    described[key].append(kv.write(f"{model.structure.blocks}.{b}", payload / block_file(b)))
                elif spec.statistic == kv_fisher.KIND:
                    of_block = {n: t for n, t in fisher.items() if n.startswith(f"{model.structure.blocks}.{b}.")}
                    described[key].append(kv_capture.save(of_block, payload / block_file(b)))
                elif spec.statistic != site_moments.KIND:
                    described[key].append(_write(payload, model.structure, b, spec.statistic, found))
    summaries = {}
    for key, (spec, payload) in stages.items():
        if spec.statistic == site_moments.KIND:
            assert table is not None
            described[key] = table.write(payload)
        facts = {
            "statistic": spec.statistic,
            "sequences": sequences,
            "sample_sequences": kept if spec.statistic in ("samples", *OF_CACHE) else None,
        }
        index = {"format": FORMAT, **facts, "sequence_length": length, "blocks": described[key], "linears": _inputs(model.structure)}
        (payload / SITES).write_text(json.dumps(index, indent=1, sort_keys=True))
        summaries[key] = {
            **facts,
            "tokens": sequences * length,
            "sites": sum(len(d["sites"]) for d in described[key]),
            "bytes": sum(p.stat().st_size for p in payload.iterdir()),
            "peak_memory_bytes": peak.bytes(),
        }
    return summaries


def _check(specs: Sequence[CalibrateSpec]) -> None:
    for spec in specs:
        if spec.statistic not in (*OF_CACHE, site_moments.KIND):
            check_kind(spec.statistic)
        if (spec.model, spec.calibration) != (specs[0].model, specs[0].calibration):
            raise InputError("calibrate stages of one request must share model and calibration set; send the others separately")


def _inputs(structure: Structure) -> dict[str, str]:
    """Linear ▸ the first linear that reads its input, by full names."""
    sites = [(b, s) for b in range(structure.count) for s in structure.sites]
    return {structure.path(b, n): structure.path(b, s.linears[0]) for b, s in sites for n in s.linears}


def calibration_tokens(context: Context, model: BlockModel, calibration: CalibrationSpec) -> Tensor:
    """`[S, T]` token ids on the CPU. Raises InputError for a tokenizer or a window that does not suit the model."""
    config = model.model.config
    stated = config.to_dict()
    refusal, limit = refuses_calibration(calibration.sequence_length, stated), positions(stated)
    if refusal is not None:
        raise InputError(refusal)
    if limit is not None and calibration.sequence_length > limit:
        context.notes.append(f"calibration windows of {calibration.sequence_length} tokens are longer than the model's {limit} positions")
    with context.phase("text"):
        tokenizer = datasets.load_tokenizer(Location("folder", str(model.checkpoint.folder)))
        tokens = datasets.calibration_tokens(context.text_location(calibration.text), calibration, tokenizer).to(torch.long)
    if int(tokens.max()) >= config.vocab_size:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, the model knows {config.vocab_size}; the tokenizer is another model's"
        )
    return tokens


def _write(payload: Path, structure: Structure, block: int, kind: str, found: BlockStatistics) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    sites = {}
    for name, statistics in found.sites.items():
        value = getattr(statistics, kind)
        if kind == "hessian" and name in structure.routed_inputs():
            continue  # no linear reads it; only scale groups do, and they need no Hessian
        path = structure.path(block, name)
        tensors[path] = value.detach().to("cpu").contiguous()
        sites[path] = {"tokens": found.tokens[name], "cols": value.shape[-1]}
    save_file(tensors, payload / block_file(block))
    return {"file": block_file(block), "sites": sites}


def _note_unused(context: Context, structure: Structure, block: int, found: BlockStatistics) -> None:
    for name, tokens in found.tokens.items():
        if tokens == 0:
            context.notes.append(f"no calibration token reached {structure.path(block, name)}; its statistics are zero")
