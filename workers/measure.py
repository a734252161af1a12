"""The measure stage: memory and speed of a variant while it generates, with the packed weights that were evaluated.

Input: `quantize`, the artifact of the variant (none: the unquantized model). A prompt of random tokens fills the cache, then
tokens are decoded one at a time. The packed model is first checked against the simulated one (weights dequantized, as evaluated)
on the same tokens; then the same generation is repeated until the medians are known well enough. Payload: times.json with every time.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from workers.context import Context
from workers.environment import environment
from workers.errors import InputError, NumericalError
from workers.memory import PeakMemory
from workers.packed import DENSE, SIMULATED, Packed, pack_linears
from workers.recipe import Recipe
from workers.residency import Residency
from workers.specs import MeasureSpec, Workload

TIMES = "times.json"
FEWEST, MOST = 6, 100
"""Timed generations. The range of fewer than 6 covers a median less than 95 times in 100."""
LONGEST_S = 60.0
"""After which no further generation starts."""
TIGHT = 0.05
"""Half the width of the 95 % interval of a median, relative to it, that is good enough."""
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""Relative error of logits, over all of them. A product's rounding error passes some tens of layers, and sums are in another order."""
CACHES = ("past_key_values", "state")
"""Names under which models return, and take, what they keep of earlier tokens."""
T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    tokens: Tensor
    """`[B, steps]`, what went in after the prompt."""
    logits: Tensor
    """`[B, steps + 1, V]`: after the prompt, and after each step."""
    seconds: list[float]
    """Of the prompt, and of each step."""


def run_measure(spec: MeasureSpec, inputs: Mapping[str, Path], payload: Path, context: Context, residency: Residency) -> dict[str, Any]:
    """Write times.json into `payload`; return the figures, seconds per pass and tokens per second over all sequences.

    Raises InputError (another device than the spec's, a backend that does not take the weights, no cache), NumericalError where the
    packed model departs from the simulated one.
    """
    _check_device(spec, context)
    artifact, steps = inputs.get("quantize"), spec.workload.tokens
    with _threads(spec.workload.threads):
        if artifact is None:
            model, packed, error = residency.unquantized(context, spec.model), None, None
            prompt = _prompt(model, spec.workload, context.device)
        else:
            model = residency.variant(context, spec.model, artifact)
            prompt = _prompt(model, spec.workload, context.device)
            with residency.runtime(model, artifact, spec.activation, None):
                simulated = _generate(model, prompt, steps, context.device)
            noise = 0.0
            if spec.activation is not None:
                noise = _distance(_generate(model, prompt, steps, context.device, simulated.tokens).logits, simulated.logits)
            residency.clear()  # or its memory would count as the packed model's
            with context.phase("rebuild"):
                model = residency.builder.rebuild(context, spec.model, artifact).eval()
                packed = pack_linears(model, Recipe(artifact), spec.workload.backend, context.device, spec.activation)
            found = _generate(model, prompt, steps, context.device, simulated.tokens)
            error = _check(found.logits, simulated.logits, spec.model.dtype, noise)
        peak = PeakMemory(context.device, context.kept)
        with context.phase("time"):
            runs = _repeat(lambda: _generate(model, prompt, steps, context.device).seconds)
        summary = {**_speeds(runs, spec.workload, context), **_memory(model, packed), "peak_memory_bytes": peak.bytes()}
        device = environment(str(context.device))
    (payload / TIMES).write_text(json.dumps({"prefill": [r[0] for r in runs], "decode": [r[1:] for r in runs]}))
    if packed is not None:
        name = DENSE if spec.activation is None else SIMULATED
        context.notes += [f"{n} linears ran {name}: {reason}" for reason, n in packed.reasons.items()] + sorted(packed.notes)
    backends = {} if packed is None else dict(packed.backends)
    return {**summary, "check_error": error, "backends": backends, "device": device["device_name"], "threads": device["threads"]}


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


def _prompt(model: nn.Module, workload: Workload, device: torch.device) -> Tensor:
    """`[B, P]`, the same tokens for every variant of a model."""
    config: Any = model.config
    random = torch.Generator().manual_seed(0)
    return torch.randint(int(config.vocab_size), (workload.batch, workload.prompt), generator=random).to(device)


@torch.inference_mode()
def _generate(model: nn.Module, prompt: Tensor, steps: int, device: torch.device, given: Tensor | None = None) -> Generation:
    """The most likely tokens after the prompt, or `given` `[B, steps]`, one at a time."""
    # The head's product for a whole prompt is thrown away by all who generate.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    seconds: list[float] = []
    kept: dict[str, Any] = {}
    x = prompt
    for step in range(steps + 1):
        out, took = _timed(lambda: model(input_ids=x, use_cache=True, **last, **kept), device)  # noqa: B023
        name = next((n for n in CACHES if getattr(out, n, None) is not None), None)
        if name is None:
            raise InputError(f"a {type(model).__name__} returns none of {', '.join(CACHES)}, so that it cannot decode token by token")
        kept = {name: getattr(out, name)}
        seconds.append(took)
        logits.append(out.logits[:, -1].float())
        if step < steps:
            x = logits[-1].argmax(-1, keepdim=True) if given is None else given[:, step : step + 1]
            tokens.append(x)
    return Generation(torch.cat(tokens, 1), torch.stack(logits, 1), seconds)


def _timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    if device.type != "cuda":
        start = time.perf_counter()
        return run(), time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    out = run()
    end.record()
    end.synchronize()
    return out, begin.elapsed_time(end) / 1000


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative, over all."""
    return float((found - expected).double().norm() / expected.double().norm())


def _check(found: Tensor, expected: Tensor, dtype: str, noise: float = 0.0) -> float:
    """Relative error of the packed model's logits; raises NumericalError where it is above the tolerance, or not a number.

    noise: what rounding activations changes. A sum in another order may put one value on the other side of a boundary between two codes;
    in later layers many follow, until packed and simulated model are two roundings of the same, √2 noise apart."""
    error, allowed = _distance(found, expected), TOLERANCE[dtype] + 2 * noise
    if not error <= allowed:
        raise NumericalError(
            f"logits with packed weights differ from the simulated ones by {error:.2g} of their norm, above {allowed:.2g}; "
            "use workload.backend=dense and report this"
        )
    return error


def _repeat(run: Callable[[], list[float]]) -> list[list[float]]:
    """Seconds of each generation, once warm, until prompt and steps are known well enough."""
    run()
    runs: list[list[float]] = []
    start = time.perf_counter()
    while len(runs) < FEWEST or (len(runs) < MOST and time.perf_counter() - start < LONGEST_S and not _tight(runs)):
        runs.append(run())
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
    low, high = interval([float(np.median(r[1:])) for r in runs])
    out: dict[str, Any] = {"runs": len(runs), "decode_low_s": low, "decode_high_s": high}
    for name, values in (("prefill", prompts), ("decode", steps)):
        out[f"{name}_p50_s"], out[f"{name}_p95_s"] = (float(np.quantile(values, q)) for q in (0.5, 0.95))
    out["prefill_tokens_per_s"] = workload.batch * workload.prompt / out["prefill_p50_s"]
    out["decode_tokens_per_s"] = workload.batch / out["decode_p50_s"]
    return out


def _memory(model: nn.Module, packed: Packed | None) -> dict[str, int]:
    """Bytes of weights on the device, and those of quantized linears that kernels read packed."""
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    read = 0 if packed is None else packed.bytes
    return {"weights_bytes": own + read, "packed_bytes": read}
