"""Runs the stages of one request, one after another, and reports each as it ends.

    python -m workers.run_stage request.json [--outcomes FILE]

A stage gets a fixed seed from its key, fixed threads, and a staging folder for payload/ and log.txt. Whatever it raises
becomes a classed failure of that stage alone. Nothing is committed here: the driver does. Only the standard library is
imported until a stage runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.artifact import PAYLOAD, share
from workers.failures import failure, tail
from workers.process import current, fixed_state, formatted, logged, pick_device
from workers.request import ErrorClass, Outcome, Request, StageRequest
from workers.specs import SPEC_TYPES, CalibrateSpec, EvaluateSpec, MeasureSpec, PrepareSpec, QuantizeSpec, Spec, StageKind, from_json

if TYPE_CHECKING:
    from workers.context import Context
    from workers.residency import Residency

log = logging.getLogger("workers")
_one_request = threading.Lock()
"""Seeds, threads, log handlers and resident models belong to the process."""


@dataclass(frozen=True)
class Runners:
    """The stage functions."""

    calibrate: Callable[[Mapping[str, tuple[CalibrateSpec, Path]], Context], dict[str, dict[str, Any]]]
    quantize: Callable[[QuantizeSpec, Mapping[str, Path], Path, Context], dict[str, Any]]
    evaluate: Callable[[EvaluateSpec, Mapping[str, Path], Path, Context, Residency], dict[str, Any]]
    prepare: Callable[[PrepareSpec, Mapping[str, Path], Path, Context], dict[str, Any]]
    measure: Callable[[MeasureSpec, Mapping[str, Path], Path, Context, Residency], dict[str, Any]]


def _late(module: str, function: str) -> Callable[..., dict[str, Any]]:
    """A function whose module is imported when it is first called."""

    def run(*given: Any) -> dict[str, Any]:
        found: dict[str, Any] = getattr(importlib.import_module(module), function)(*given)
        return found

    return run


RUNNERS = Runners(
    calibrate=_late("workers.calibrate", "run_calibrate"),
    quantize=_late("workers.quantize", "run_quantize"),
    evaluate=_late("workers.evaluate", "run_evaluate"),
    prepare=_late("workers.prepare", "run_prepare"),
    measure=_late("workers.measure", "run_measure"),
)


def run_request(
    request: Request,
    on_outcome: Callable[[Outcome], None],
    should_stop: Callable[[], bool] = lambda: False,
    runners: Runners = RUNNERS,
) -> None:
    """Run every stage of `request`; `on_outcome` is called once per stage as it ends.

    Calibrate stages of the same model and calibration set share one forward pass; when that fails each runs alone. When `should_stop`
    says so, the running stage ends and the others get no outcome. Never raises for what a stage does. One request runs at a time in a
    process.
    """
    with _one_request:
        for group in _groups(request.stages):
            if should_stop():
                return
            for outcome in _run_group(group, request, runners):
                on_outcome(outcome)


def _groups(stages: Sequence[StageRequest]) -> list[list[StageRequest]]:
    """Stages in order; the calibrate stages that share a forward pass together, where the first of them stands."""
    groups: dict[str, list[StageRequest]] = {}
    for stage in stages:
        shared = stage.kind == StageKind.CALIBRATE.value
        name = json.dumps([stage.spec.get("model"), stage.spec.get("calibration")], sort_keys=True) if shared else stage.key
        groups.setdefault(name, []).append(stage)
    return list(groups.values())


def _run_group(group: list[StageRequest], request: Request, runners: Runners) -> list[Outcome]:
    outcomes = _with_all_memory(group, request, runners)
    failures = [o.failure for o in outcomes if o.failure is not None]
    if len(group) == 1 or not failures or any(f.error_class is ErrorClass.MEMORY for f in failures):
        return outcomes  # what lacks memory is tried again by the driver, with other settings
    # What one of them cannot do must not fail the others.
    _remove_payloads(group)
    alone = [outcome for stage in group for outcome in _try_group([stage], request, runners)]
    why = f"the pass shared with {len(group) - 1} other calibrate stages failed ({failures[0].type}: {failures[0].message})"
    for outcome in alone:
        if outcome.record is not None:
            outcome.record["notes"].append(f"ran again alone: {why}")
    return alone


def _with_all_memory(group: list[StageRequest], request: Request, runners: Runners) -> list[Outcome]:
    """Again, where memory ran out while the process kept statistics for later stages: they are gone by then, and none are kept."""
    outcomes = _try_group(group, request, runners)
    given_back = sum(_give_up_kept() for o in outcomes if o.failure is not None and o.failure.error_class is ErrorClass.MEMORY)
    if not given_back:
        return outcomes
    _remove_payloads(group)
    again = _try_group(group, replace(request, hints=replace(request.hints, kept_bytes=0)), runners)
    for outcome in again:
        if outcome.record is not None:
            outcome.record["notes"].append(
                f"ran again: memory ran out, and {given_back} bytes that the worker kept for later stages were given back"
            )
    return again


def _remove_payloads(group: list[StageRequest]) -> None:
    for stage in group:
        shutil.rmtree(Path(stage.staging) / PAYLOAD, ignore_errors=True)


def _try_group(group: list[StageRequest], request: Request, runners: Runners) -> list[Outcome]:
    started = time.time(), time.perf_counter()
    try:
        with logged([Path(stage.staging) for stage in group]):
            return _run_logged(group, request, runners, started)
    except Exception as e:  # the staging folder itself cannot be used
        return [Outcome(stage.key, failure=failure(e, formatted(e))) for stage in group]


def _run_logged(group: list[StageRequest], request: Request, runners: Runners, started: tuple[float, float]) -> list[Outcome]:
    """`started`: by the clock, and by one that nobody sets: an hour that the clock is put back is no estimate."""
    for stage in group:
        log.info("%s %s, attempt %d", stage.kind, stage.key, stage.attempt)
    try:
        context = _context(request)
        from quant.kernels import noted, preferring, recorded
        from workers.environment import environment

        # What measure times is in its spec.
        backend = "auto" if group[0].kind == StageKind.MEASURE.value else request.hints.backend
        state = fixed_state(group[0].key, request.hints)
        with current(context.device), state, preferring(backend, "hints.backend"), recorded() as kernels, noted() as slower:
            summaries = _dispatch(group, context, runners)
            for stage in group:
                share(Path(stage.staging) / PAYLOAD)
            surroundings = environment(str(context.device))  # here, where the stage's own threads are still set
    except Exception as e:
        log.error("failed\n%s", formatted(e))
        outcomes = [Outcome(stage.key, failure=failure(e, tail(Path(stage.staging)))) for stage in group]
        if any(o.failure and o.failure.error_class is ErrorClass.MEMORY for o in outcomes):
            # A retry with smaller batches needs the room that resident models take.
            _give_up_models()
        return outcomes
    seconds = time.perf_counter() - started[1]
    # Those that a stage has told of its linears are not told again.
    context.notes += [note for note in slower if not any(note in told for told in context.notes)]
    log.info("done in %.2f s", seconds)
    return _records(group, request, context, summaries, kernels, surroundings, (started[0], started[0] + seconds))


def _dispatch(group: list[StageRequest], context: Context, runners: Runners) -> dict[str, dict[str, Any]]:
    """Key ▸ summary. A group of several is calibrate stages."""
    specs = {stage.key: _spec(stage) for stage in group}
    payloads = {stage.key: Path(stage.staging) / PAYLOAD for stage in group}
    for payload in payloads.values():
        payload.mkdir(exist_ok=True)
    stage, spec = group[0], specs[group[0].key]
    inputs = {role: Path(i.path) for role, i in stage.inputs.items()}
    if isinstance(spec, (EvaluateSpec, MeasureSpec)):
        from workers.residency import process_residency

        residency = process_residency()
        if isinstance(spec, EvaluateSpec):
            return {stage.key: runners.evaluate(spec, inputs, payloads[stage.key], context, residency)}
        return {stage.key: runners.measure(spec, inputs, payloads[stage.key], context, residency)}
    if isinstance(spec, QuantizeSpec):
        return {stage.key: runners.quantize(spec, inputs, payloads[stage.key], context)}
    if isinstance(spec, PrepareSpec):
        return {stage.key: runners.prepare(spec, inputs, payloads[stage.key], context)}
    wanted = {key: (s, payloads[key]) for key, s in specs.items() if isinstance(s, CalibrateSpec)}
    return runners.calibrate(wanted, context)


def _give_up_models() -> None:
    """Nothing is resident where nobody has asked for it yet."""
    residency = sys.modules.get("workers.residency")
    if residency is not None:
        residency.process_residency().clear()


def _give_up_kept() -> int:
    """Bytes of statistics and factors that were kept until now."""
    kept = sys.modules.get("workers.kept")
    given_back: int = 0 if kept is None else kept.process_kept().clear()
    return given_back


def _spec(stage: StageRequest) -> Spec:
    spec: Spec = from_json(SPEC_TYPES[StageKind(stage.kind)], stage.spec)
    return spec


def _records(
    group: list[StageRequest],
    request: Request,
    context: Context,
    summaries: dict[str, dict[str, Any]],
    kernels: dict[str, list[str]],
    surroundings: dict[str, Any],
    interval: tuple[float, float],
) -> list[Outcome]:
    """One draft record per stage. Stages that shared a forward pass get equal, consecutive shares of its time, so that
    times add up over stages."""
    kept = context.kept.told() if context.kept is not None else {}
    part = (interval[1] - interval[0]) / len(group)
    notes = list(context.notes)
    if len(group) > 1:
        notes.append(f"ran together with {len(group) - 1} other calibrate stages; its times are an equal share")
    seconds = {name: value / len(group) for name, value in context.seconds.items()}
    return [
        Outcome(
            stage.key,
            record={
                "started": interval[0] + i * part,
                "ended": interval[0] + (i + 1) * part,
                "seconds": {**seconds, "total": part},
                "environment": surroundings,
                "hints": asdict(request.hints),
                "kernels": kernels,
                **({"kept": kept} if kept else {}),
                "notes": notes,
                "summary": summaries[stage.key],
            },
        )
        for i, stage in enumerate(group)
    ]


def _context(request: Request) -> Context:
    from workers.context import Context
    from workers.kept import process_kept

    device, kept = pick_device(request.hints), process_kept()
    kept.begin(device, request.hints.kept_bytes, request.hints.kept_host_bytes)
    return Context(models=request.models, texts=request.texts, hints=request.hints, device=device, toolkits=request.toolkits, kept=kept)


def main(argv: Sequence[str] | None = None, runners: Runners = RUNNERS) -> int:
    """Exit code 0 when every stage of the request succeeded, 1 otherwise, 2 for a request that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m workers.run_stage", description="Run the stages of one request.")
    parser.add_argument("request", type=Path, help="a request as JSON (workers.request.Request)")
    parser.add_argument("--outcomes", type=Path, help="append outcomes, one JSON object a line, to this file instead of stdout")
    options = parser.parse_args(argv)
    try:
        request = Request.from_json(json.loads(options.request.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        print(f"{options.request} is not a request: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    succeeded: list[str] = []
    with ExitStack() as stack:
        out = stack.enter_context(options.outcomes.open("a")) if options.outcomes else sys.stdout

        def report(outcome: Outcome) -> None:
            print(json.dumps(outcome.to_json()), file=out, flush=True)
            if outcome.failure is None:
                succeeded.append(outcome.key)

        run_request(request, report, runners=runners)
    return 0 if len(succeeded) == len(request.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
