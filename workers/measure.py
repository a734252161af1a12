"""The measure stage: memory and speed of a variant while it generates, with the packed weights that were evaluated.

Input: `quantize`, the artifact of the variant (none: the unquantized model). A prompt of random tokens fills the cache, then
tokens are decoded one at a time. Each packed linear is first checked against its dequantized weight, then the packed model against
the simulated one (weights dequantized, as evaluated) on the same random tokens; then the same generation is repeated until the medians
are known well enough, on a GPU with a step captured as a graph where it can be. Payload: times.json with every time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quant.kernels.kv_attention import field
from quant.scheme import KVScheme
from workers import families, generation
from workers.artifact import read_record
from workers.checkpoint import open_checkpoint
from workers.comparison import Comparison, distance
from workers.context import Context
from workers.environment import clocks_mhz, environment
from workers.errors import InputError
from workers.generation import Decoder, Eager, Generation, Graphed, NoGraph, generate
from workers.memory import PeakMemory
from workers.nvml import EnergyMeter
from workers.packed import DENSE, SIMULATED, Packed, weights_bytes
from workers.packed_cache import PackedCaches
from workers.rebuild import rebuild_packed, too_large_to_time
from workers.residency import Residency
from workers.specs import MeasureSpec, Workload
from workers.stream import streams

TIMES = "times.json"
FEWEST, MOST = 6, 100
"""Timed generations. The range of fewer than 6 covers a median less than 95 times in 100."""
LONGEST_S = 60.0
"""After which no further generation starts."""
TIGHT = 0.05
"""Half the width of the 95 % interval of a median, relative to it, that is good enough."""


def run_measure(spec: MeasureSpec, inputs: Mapping[str, Path], payload: Path, context: Context, residency: Residency) -> dict[str, Any]:
    """Write times.json into `payload`; return the figures: seconds per pass (the median of steps is that of generations' medians), tokens
    per second of all sequences together (of a prompt, and of all steps of a generation, of which the median counts), bytes, joules of a
    generation and of a decoded token (its share of the prompt included), None where the device does not count them.

    Raises InputError (another device than the spec's, a backend that does not take the weights, no cache, weights above
    `hints.memory_bytes`: streamed, the time would be the disk's), NumericalError where the packed model departs from the simulated one.
    """
    _check_device(spec, context)
    if (reason := families.refuses_steps(spec.workload.batch, open_checkpoint(context.model_location(spec.model)).config)) is not None:
        raise InputError(reason)
    artifact, steps = inputs.get("quantize"), spec.workload.tokens
    with _threads(spec.workload.threads), ExitStack() as stack:
        packed = None
        if artifact is None:
            residency.drop_variants()  # or their memory would count as the unquantized model's
            whole = replace(context, hints=replace(context.hints, streamed=False))
            model = _resident(residency.unquantized(whole, spec.model), context)
        else:
            model = residency.variant(context, spec.model, artifact)
        prompt, given = _tokens(model, spec.workload, context.device)
        comparison = Comparison(spec, prompt, given, context)
        if artifact is not None or spec.kv is not None:
            comparison.simulate(model, artifact, residency)
        if artifact is not None:
            del model
            residency.clear()  # or its memory would count as the packed model's
            with context.phase("rebuild"):
                rows = (spec.workload.batch, prompt.numel())
                model, packed = rebuild_packed(context, spec.model, artifact, spec.workload.backend, spec.activation, rows)
        caches = None if spec.kv is None else PackedCaches(model, spec.kv, spec.workload, context.device)
        if caches is not None:
            stack.enter_context(caches.attached())
        decoder: Decoder = Eager(model, caches)
        with nullcontext() if caches is None else caches.checking():
            found = comparison.check(decoder, model)
        decoder = _fastest(decoder, model, prompt, found, caches, comparison.allowed, context)
        error = comparison.error
        del found, comparison  # or the logits of checking would count as the model's memory
        if context.device.type == "cuda":
            torch.cuda.empty_cache()  # what checking left would count as reserved
        peak, meter = PeakMemory(context.device, context.kept), EnergyMeter(context.device)
        with context.phase("time"):
            runs = _repeat(lambda: generate(decoder, prompt, steps, last_only=True).seconds, meter)
        clocks, device = clocks_mhz(str(context.device)), environment(str(context.device))
    (payload / TIMES).write_text(json.dumps({"prefill": [r[0] for r in runs], "decode": [r[1:] for r in runs]}))
    if packed is not None:
        name = DENSE if spec.activation is None else SIMULATED
        context.notes += [f"{n} linears ran {name}: {reason}" for reason, n in packed.reasons.items()] + sorted(packed.notes)
    return {
        **_speeds(runs, spec.workload, context),
        **_stored(spec, artifact, context),
        **_memory(model, packed),
        **_cache(caches, spec.kv, context),
        "peak_memory_bytes": peak.bytes(),
        "peak_reserved_bytes": peak.reserved(),
        **_energy(meter, len(runs), spec.workload, context),
        "check_error": error,
        "product_error": None if packed is None or not packed.bytes else packed.error,
        "backends": {} if packed is None else dict(packed.backends),
        "products": [] if packed is None else sorted(packed.products),
        "graph": isinstance(decoder, Graphed),
        "device": device["device_name"],
        "threads": device["threads"],
        "clocks_mhz": clocks,
    }


def _resident(model: nn.Module, context: Context) -> nn.Module:
    if streams(model):
        raise too_large_to_time(context.hints.memory_bytes)
    return model


def _fastest(
    decoder: Decoder, model: nn.Module, prompt: Tensor, found: Generation, caches: PackedCaches | None, allowed: float, context: Context
) -> Decoder:
    """Steps as one launch where the device has that, the model can be captured, and the replayed logits are those of `found`."""
    if not generation.has_graphs(context.device):
        return decoder
    try:
        graphed = Graphed(model, prompt, found.tokens.shape[1], None if caches is None else caches())
        error = distance(generate(graphed, prompt, found.tokens.shape[1], found.tokens).logits, found.logits)
        if not error <= allowed:
            raise NoGraph(f"its logits differ from those of steps that are not captured by {error:.2g} of their norm, above {allowed:.2g}")
    except NoGraph as e:
        context.notes.append(f"steps were launched kernel by kernel, not as a CUDA graph: {e}")
        return decoder
    return graphed


def _check_device(spec: MeasureSpec, context: Context) -> None:
    found = environment(str(context.device))["device_name"]
    if found != spec.device:
        raise InputError(
            f"this worker's device is {found!r}, the measurement is of {spec.device!r}; "
            f"choose it with workload.device='{found}', or run on a worker that has the other"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tokens(model: nn.Module, workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """A prompt `[B, P]` and what follows in a comparison `[B, tokens]`, the same for every variant of a model."""
    config: Any = model.config
    random = torch.Generator().manual_seed(0)
    prompt, given = (
        torch.randint(int(config.vocab_size), (workload.batch, n), generator=random).to(device) for n in (workload.prompt, workload.tokens)
    )
    return prompt, given


def _repeat(run: Callable[[], list[float]], meter: EnergyMeter) -> list[list[float]]:
    """Seconds of each generation, once warm, until prompt and steps are known well enough and the meter has run long enough."""
    run()
    runs: list[list[float]] = []
    start = time.perf_counter()
    meter.start()
    while True:
        runs.append(run())
        took = time.perf_counter() - start
        if len(runs) >= FEWEST and (len(runs) >= MOST or took >= LONGEST_S or (took >= meter.least_s and _tight(runs))):
            break
    meter.stop()
    return runs


def _tight(runs: Sequence[Sequence[float]]) -> bool:
    return all(_half_width(values) <= TIGHT for values in ([r[0] for r in runs], [float(np.median(r[1:])) for r in runs]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """At least 95 %, of the median: the innermost pair of order statistics that covers it (binomial distribution of how many values lie
    below it; Conover 1999, section 3.2). From 6 values on."""
    ranked, n = sorted(values), len(values)
    rank, below = -1, 0
    while (more := below + math.comb(n, rank + 1)) <= 0.025 * 2**n:
        rank, below = rank + 1, more
    return ranked[max(rank, 0)], ranked[n - 1 - max(rank, 0)]


def _half_width(values: Sequence[float]) -> float:
    low, high = interval(values)
    return (high - low) / 2 / float(np.median(values))


def _speeds(runs: Sequence[Sequence[float]], workload: Workload, context: Context) -> dict[str, Any]:
    prompts, steps = [r[0] for r in runs], [s for r in runs for s in r[1:]]
    if not _tight(runs):
        context.notes.append(f"times vary: after {len(runs)} generations a median is known to no better than {TIGHT:.0%}")
    typical = [float(np.median(r[1:])) for r in runs]
    low, high = interval(typical)
    out: dict[str, Any] = {"runs": len(runs), "decode_low_s": low, "decode_high_s": high}
    for name, values in (("prefill", prompts), ("decode", steps)):
        out[f"{name}_p50_s"], out[f"{name}_p95_s"] = (float(np.quantile(values, q)) for q in (0.5, 0.95))
    out["decode_p50_s"] = float(np.median(typical))  # what the interval is of: that of all steps may lie outside it
    out["prefill_tokens_per_s"] = workload.batch * workload.prompt / out["prefill_p50_s"]
    # Of whole generations: some steps take longer than most, as where keys of a cache age.
    out["decode_tokens_per_s"] = workload.batch * workload.tokens / float(np.median([sum(r[1:]) for r in runs]))
    return out


def _stored(spec: MeasureSpec, artifact: Path | None, context: Context) -> dict[str, Any]:
    """Bytes of all weights on disk, and bits per weight of the quantized linears as the quantize stage counted them."""
    if artifact is None:
        return {"disk_bytes": open_checkpoint(context.model_location(spec.model)).bytes, "bits_stored": None}
    summary = read_record(artifact).get("summary", {})
    return {"disk_bytes": summary.get("model_bytes"), "bits_stored": summary.get("bits_stored")}


def _cache(caches: PackedCaches | None, kv: KVScheme | None, context: Context) -> dict[str, Any]:
    """Which kernel attended, and bytes that the last step read of keys and values; nothing where these are not quantized."""
    if caches is None or kv is None:
        return {}
    context.notes += caches.chosen.notes
    widths = sorted({kv.bits, kv.value_bits or kv.bits})
    context.notes += [f"codes of {bits} bits were read from fields of {field(bits)}" for bits in widths if field(bits) != bits]
    if caches.chosen.backend == "reference":
        context.notes.append("kv_attention ran as its reference, whose time says nothing of the format's speed")
    if caches.unchecked:
        context.notes.append(f"attention to the packed cache was compared in all blocks but {caches.unchecked}: memory was lacking")
    return {"kv_backend": caches.chosen.backend, "kv_bytes": caches.bytes, "kv_error": caches.error}


def _energy(meter: EnergyMeter, runs: int, workload: Workload, context: Context) -> dict[str, Any]:
    if meter.joules is None:
        if context.device.type == "cuda":
            context.notes.append(f"energy was not measured: {meter.reason}")
        return {"run_energy_j": None, "token_energy_j": None}
    each = meter.joules / runs
    return {"run_energy_j": each, "token_energy_j": each / (workload.batch * workload.tokens)}


def _memory(model: nn.Module, packed: Packed | None) -> dict[str, int]:
    """Bytes of weights on the device, and those of quantized linears that kernels read packed."""
    return {"weights_bytes": weights_bytes(model, packed), "packed_bytes": 0 if packed is None else packed.bytes}
