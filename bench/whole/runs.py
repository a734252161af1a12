"""A whole model: checked on two layers, then timed from its files to a committed artifact, beside other programs and what limits it."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.on_gpu.clock import Bench, Goal, Row
from bench.whole.check import ALLOWED, Yardstick, check, tokens_of
from bench.whole.peers import beside, sampled_kmeans
from bench.whole.shapes import SHAPES, Shape, make_model
from bench.whole.stages import Made, quantize, spec_of
from bench.whole.streamed import STREAMED, bytes_from_disk, forget
from workers.artifact import flush
from workers.request import Hints
from workers.rounding import make_methods
from workers.run_stage import RUNNERS
from workers.specs import QuantizeSpec

GB = 1e9
FEW = 2
"""Layers that are quantized first."""
LONGEST = 420.0
"""Seconds that a streamed run may take where nothing else is said; one that needs more is cut to fewer layers."""


@dataclass(frozen=True)
class Work:
    method: str
    shape: str
    params: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None
    """All of the shape where it is None."""
    samples: int = 128
    length: int = 2048
    propagation: str = "quantized"
    streamed: bool = False
    """One layer's file stands for all."""
    goal: Goal | None = None
    """Of all layers of the shape."""
    published: str = ""
    departure: str = ""
    """From the method as published, in words."""

    @property
    def spec(self) -> QuantizeSpec:
        return spec_of(self.method, self.samples, self.length, self.params, self.propagation)

    @property
    def damp(self) -> float | None:
        """None where the method has none."""
        damp: float | None = getattr(make_methods(self.spec.rules)[0].by, "damp", None)
        return damp


def model_in(root: Path, work: Work, layers: int, device: str, *, one: bool = False) -> Path:
    """Made where it is not there. one: a single layer has a file."""
    folder = root / f"{work.shape}-{f'one-of-{layers}' if one else layers}"
    if not folder.exists():
        began, part = time.perf_counter(), folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
        make_model(part, SHAPES[work.shape], layers, device, 1 if one else None)
        part.rename(folder)
        print(f"made {folder.name} in {time.perf_counter() - began:.1f} s", flush=True)
    return folder


def measured(work: Work, root: Path, b: Bench, hints: Hints) -> Row:
    """Not timed where its check failed."""
    shape, spec, cuda = SHAPES[work.shape], work.spec, b.device.type == "cuda"
    layers, few = work.layers or shape.layers, min(FEW, shape.layers)
    small = model_in(root, work, few, b.device.type)
    tokens = None if spec.calibration is None else tokens_of(spec, small)
    yardstick = None if tokens is None else Yardstick(tokens, small, spec.rules[0].weight, b.device)
    first = quantize(spec, small, root, hints)
    checked = check(first, small, spec, yardstick, b.device)
    print(f"{work.method}, {work.shape}, {few} layers: {first.seconds:.2f} s the first time; {checked}", flush=True)
    if not checked.error <= ALLOWED:
        return Row(_name(work, layers), checked.error, ALLOWED)
    if cuda:
        longest = b.longest or (LONGEST if work.streamed else math.inf)
        layers = fitting(layers, few, longest, first.seconds, lambda: quantize(spec, small, root, hints).seconds)
    peers: dict[str, float] = {}
    if not b.alone:
        torch.cuda.empty_cache()  # for their processes
        if work.method == "gptq" and tokens is not None and yardstick is not None:
            peers |= beside(small, tokens, yardstick, layers / few)
        if work.method == "claq":
            peers |= sampled_kmeans(small, shape, layers, 2 ** spec.rules[0].weight.bits, min(8, os.cpu_count() or 1))
    del yardstick
    if b.dry and layers == few and not work.streamed:
        made = first  # nothing is timed
        read = None
    else:
        model = model_in(root, work, layers, b.device.type, one=work.streamed)
        shards = list(model.glob("*.safetensors"))
        for shard in shards:  # just written, or read by a run before: weights are to come from the disk
            flush(shard)
            forget(shard)
        before = bytes_from_disk()
        made = quantize(spec, model, root, hints, STREAMED if work.streamed else RUNNERS)
        read = None if before is None else ((bytes_from_disk() or 0) - before) / sum(s.stat().st_size for s in shards)
    streamed = made.record["summary"].get("streamed")
    return Row(
        _name(work, layers), checked.error, ALLOWED, None if b.dry else 1e6 * seconds_of(made), peers,
        goal=work.goal if layers == shape.layers else None, work={"bfloat16": operations(shape, layers, work)}, launches=0,
        more=_more(shape, layers, b, streamed), details=told(work, layers, made, read),
    )  # fmt: skip


def fitting(layers: int, few: int, longest: float, first: float, again: Callable[[], float]) -> int:
    """As many of the layers as take `longest` seconds, at the rate of `few`; those at least. first: seconds of the few with all that had to
    be loaded and compiled, so that no rate is higher: where that fits, nothing is run again."""
    if first / few * layers <= longest:
        return layers
    seconds = again()
    print(f"{few} layers: {seconds:.2f} s the second time", flush=True)
    found = max(few, min(layers, int(longest / seconds * few)))
    if found < layers:
        print(f"cut to {found} of {layers} layers: all would take longer than {longest:.0f} s", flush=True)
    return found


def seconds_of(made: Made) -> float:
    """Of the work: what a streamed run measures of its disk first is none of it."""
    return made.seconds - float(made.record["summary"].get("streamed", {}).get("apart_s", 0))


def _name(work: Work, layers: int) -> str:
    fed = f"{work.samples} x {work.length} tokens, propagation={work.propagation}, damp={work.damp}"
    streamed = ", streamed" if work.streamed else ""
    departure = f", {work.departure}" if work.departure else ""
    return (
        f"{work.method} of {layers} of {SHAPES[work.shape].layers} layers, {work.shape}-shaped{streamed}, {fed}, {work.params}{departure}"
    )


def operations(shape: Shape, layers: int, work: Work) -> float:
    """Of one forward and of half of each Hessian: multiplications and additions both count."""
    tokens, heads = work.samples * work.length, shape.hidden * work.length
    weights = sum(n * k for n, k in shape.linears().values())
    hessians = 3 * shape.hidden**2 + shape.inner**2
    return float(layers * tokens * (2 * weights + 2 * heads + hessians))


def _more(shape: Shape, layers: int, b: Bench, streamed: dict[str, Any] | None) -> dict[str, float]:
    found, known = {}, b.ceilings.cholesky_us
    if shape.hidden in known and shape.inner in known:
        found["factorizations"] = layers * (3 * known[shape.hidden] + known[shape.inner])
    if streamed is not None:
        found["reading the disk"] = 1e6 * layers * streamed["layer_bytes"] / GB / streamed["disk_gbs"]
    return found


def told(work: Work, layers: int, made: Made, read: float | None) -> dict[str, Any]:
    """read: bytes that came from the disk, over those of the model's files; None where that is not known."""
    shape, record, summary = SHAPES[work.shape], made.record, made.record["summary"]
    streamed = summary.get("streamed")
    size = sum(f["bytes"] for f in record["files"].values()) + (streamed["written_bytes"] if streamed else 0)
    phases = ", ".join(f"{k} {v:.2f}" for k, v in record["seconds"].items())
    apart = f", less {streamed['apart_s']:.2f} of measuring the disk" if streamed else ""
    print(_name(work, layers))
    print(f"  {seconds_of(made):.2f} s: stage {made.stage_s:.2f} ({phases}), commit {made.commit_s:.2f}{apart}; {size / GB:.2f} GB packed")
    print(f"  peak {summary['peak_memory_bytes'] / GB:.1f} GB, {summary['bits_stored']:.3f} bits stored, kernels {record['kernels']}")
    if streamed:
        print(f"  {_streamed(streamed)}")
    else:
        print(f"  {'an unknown share' if read is None else f'{100 * read:.0f} %'} of the model came from the disk")
    if work.published:
        print(f"  published: {work.published}")
    if layers != shape.layers:
        print(f"  all {shape.layers} layers at this rate: {seconds_of(made) * shape.layers / layers:.1f} s (scaled, not measured)")
    notes = together(record["notes"])
    for note in notes:
        print(f"  note: {note}", flush=True)
    return {
        "method": work.method, "params": [f"{k}={json.dumps(v)}" for k, v in work.params.items()], "shape": work.shape, "layers": layers,
        "of": shape.layers, "samples": work.samples, "length": work.length, "propagation": work.propagation, "damp": work.damp,
        "stage_s": made.stage_s, "commit_s": made.commit_s, "seconds": record["seconds"], "bytes": size,
        "bits_stored": summary["bits_stored"], "peak_memory_bytes": summary["peak_memory_bytes"], "kernels": record["kernels"],
        "environment": record["environment"], "notes": notes, **({"streamed": streamed} if streamed else {"from_disk": read}),
    }  # fmt: skip


def together(notes: list[str]) -> list[str]:
    """What is said of several linears, once."""
    said: dict[str, list[str]] = {}
    for note in notes:
        name, colon, rest = note.partition(": ")
        said.setdefault(rest if colon and name.startswith("model.layers.") else note, []).append(note)
    return [own[0] if len(own) == 1 else f"{len(own)} linears: {rest}" for rest, own in said.items()]


def _streamed(s: dict[str, Any]) -> str:
    real = "the system does not tell what came from the disk" if s["from_disk"] is None else f"{100 * s['from_disk']:.0f} % from the disk"
    waiting = f"{s['waited_s']:.1f} s of waiting for {s['layers']} x {s['layer_bytes'] / GB:.2f} GB ({real})"
    rates = f"{s['read_gbs']:.2f} GB/s over the run; alone the loader reads {s['loader_gbs']:.2f} GB/s, threads {s['disk_gbs']:.2f}"
    return f"load-bound share {100 * s['load_bound']:.0f} %: {waiting}, {rates}; host peak {s['host_peak_bytes'] / GB:.1f} GB"
