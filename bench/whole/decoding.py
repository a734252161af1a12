"""What the stage `measure` says of packed models: quantized by stages, each decoded from the artifact that its stage committed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.on_gpu.clock import Bench, Row
from bench.whole.runs import GB, Work, model_in, together
from bench.whole.stages import committed, grouped, quantize, spec_of
from quant.scheme import ActivationScheme, Granularity, KVScheme, WeightScheme
from workers.environment import environment
from workers.measure import TOLERANCE
from workers.request import Hints
from workers.specs import MeasureSpec, StageKind, Workload

VARIANTS: tuple[tuple[str, WeightScheme, ActivationScheme | None, tuple[KVScheme | None, ...]], ...] = (
    ("w4a16_g128", grouped(4), None, (None, KVScheme(4, kind="kivi", group_size=64, residual_length=64))),
    ("w3a16_g128", grouped(3), None, (None,)),
    ("w2a16_g128", grouped(2), None, (None,)),
    ("w8a8", WeightScheme(8, symmetric=True, granularity=Granularity.CHANNEL), ActivationScheme(8), (None,)),
)
"""Weights rounded to nearest: how a code was chosen does not matter to its kernel."""


def decoded(root: Path, b: Bench, hints: Hints) -> Iterator[Row]:
    """Of a 7B-shaped model: a step of one sequence, and of 16. The error is of logits to the simulated model's, as `measure` has it."""
    work = Work("rtn", "dry" if b.dry else "7b", layers=b.layers)
    layers = work.layers or (1 if b.dry else 32)
    folder = model_in(root, work, layers, b.device.type)
    model, device = work.spec.model, environment(str(b.device))["device_name"]
    loads = tuple(replace(w, prompt=80, tokens=3) if b.dry else w for w in (Workload(1, 512, 64), Workload(16, 512, 64)))

    def row(name: str, spec: MeasureSpec, inputs: dict[str, Path], plain: dict[Workload, float]) -> Row:
        made = committed(StageKind.MEASURE, spec, inputs, folder, {}, root, hints)
        found, load = made.record["summary"], spec.workload
        took = 1e6 * found["decode_p50_s"]
        if not inputs:
            plain[load] = took
        said = f"{load.batch} x {load.prompt} tokens"
        energy = "" if found["token_energy_j"] is None else f", {found['token_energy_j']:.3f} J a token"
        print(
            f"  {name}, {said}: {found['decode_tokens_per_s']:.0f} tokens/s, prompt {1e3 * found['prefill_p50_s']:.1f} ms, weights "
            f"{found['weights_bytes'] / GB:.2f} GB, peak {found['peak_memory_bytes'] / GB:.2f} GB{energy}, {found['backends']}, "
            f"graph {found['graph']}; stage {made.stage_s:.1f} s"
        )
        for note in together(made.record["notes"]):
            print(f"  note: {note}", flush=True)
        shutil.rmtree(made.folder)
        # What the unquantized model says is what the others are compared with.
        error = found["check_error"] if inputs else 0.0
        return Row(
            f"decoding a token, {name}, {layers} layers, {work.shape}-shaped, {said}", error, TOLERANCE[model.dtype],
            None if b.dry else took, {"bfloat16": plain[load]} if inputs and not b.dry else {}, found["weights_bytes"], details=found,
        )  # fmt: skip

    plain: dict[Workload, float] = {}
    for load in loads:
        yield row("not quantized", MeasureSpec(model, load, device), {}, plain)
    for name, scheme, activation, caches in VARIANTS:
        made = quantize(spec_of("rtn", work.samples, work.length, {}, weight=scheme), folder, root, hints)
        for kv in caches:
            for load in loads:
                named = name if kv is None else f"{name}kv{kv.bits}"
                yield row(named, MeasureSpec(model, load, device, activation, kv), {"quantize": made.folder}, plain)
        shutil.rmtree(made.folder)
