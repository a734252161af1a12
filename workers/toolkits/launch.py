"""The quantize stage's side of a toolkit: start its environment's Python, wait, and give its tensors to the block loop."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import Tensor

import quant
import workers
from quant.methods.base import ANY, Linear, Rounded, Rounding
from quant.methods.toolkits import ToolkitMethod
from quant.scheme import Supports, WeightScheme
from quant.statistics import Statistics
from workers import families
from workers.calibrate import calibration_tokens
from workers.context import Context
from workers.errors import InputError, WorkerError
from workers.failures import LOG
from workers.request import ErrorClass, Failure, Input, Location, Outcome, Request, StageRequest
from workers.rounding import Method, check_shapes, method_for, toolkit_of
from workers.specs import QuantizeSpec, to_json
from workers.stream import BlockModel
from workers.toolkits.environments import problem, python_of
from workers.toolkits.job import Job, Results

log = logging.getLogger("workers.toolkits")
OUTPUT_LINES = 30
"""Of what the toolkit printed last, where it ends without an outcome."""


class ToolkitFailure(WorkerError):
    """What failed in the toolkit's own process, with the class it has there."""

    def __init__(self, toolkit: str, failure: Failure) -> None:
        super().__init__(f"{toolkit}: {failure.type}: {failure.message}")
        self.error_class = failure.error_class  # type: ignore[misc]


@dataclass(frozen=True)
class Finished:
    """A rounding that hands out what the toolkit made."""

    name: str
    version: int
    supports: Supports
    results: Results
    needs: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    uses_seed: bool = False

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        rounded = self.results.read(linear.name, weight.device)
        if rounded.tensor.shape != tuple(weight.shape):
            raise ValueError(f"the toolkit made {rounded.tensor.shape} of a weight {tuple(weight.shape)}")
        return rounded


@dataclass(frozen=True)
class Made:
    """What a toolkit did for a stage, while its files are there."""

    methods: tuple[Method, ...]
    """Those of the stage, rounding by what was made."""
    summary: dict[str, Any]
    """For the record: toolkit, package, release, the environment it ran in, seconds per phase."""
    peak_memory_bytes: int
    working_set: str

    def add_to(self, summary: dict[str, Any]) -> dict[str, Any]:
        """The stage's summary with the toolkit's part."""
        peak = max(summary["peak_memory_bytes"], self.peak_memory_bytes)
        working_set = {**summary["working_set"], "declared": self.working_set}
        return {**summary, "peak_memory_bytes": peak, "working_set": working_set, "toolkit": self.summary}


@contextmanager
def made_by_toolkit(spec: QuantizeSpec, made: tuple[Method, ...], payload: Path, context: Context, model: BlockModel) -> Iterator[Made]:
    """Run the toolkit of the rules beside `payload`. Raises InputError (rules that do not go together, no environment),
    ToolkitFailure."""
    method = _the_method(made)
    shapes = families.linear_shapes(model.checkpoint.config)
    check_shapes(shapes, made, model.structure.model_type)
    environment = _environment(method, context)
    linears = {s.name: m.scheme for s in shapes if (m := method_for(made, s.name)) is not None}
    rule = spec.rules[0]
    tokens = calibration_tokens(context, model, spec.calibration) if method.feeds_text and spec.calibration is not None else None
    folder = model.checkpoint.folder.resolve()
    job = Job(rule.method.rounding, folder, spec.model, linears, rule.method.propagation, spec.seed or 0, tokens)
    # Beside the payload: on the store's own disk, and gone before the artifact is committed.
    with TemporaryDirectory(prefix="toolkit-", dir=payload.parent.resolve()) as scratch:
        with context.phase("toolkit"):
            record = _run(method.toolkit, environment, spec, job, Path(scratch), context)
        results = Results(Path(scratch) / "payload")
        if results.names != set(linears):
            odd = sorted(results.names ^ set(linears))[:3]
            raise WorkerError(f"{method.toolkit} made {len(results.names)} linears of {len(linears)}; they differ in {', '.join(odd)}")
        context.notes += [f"{method.toolkit}: {note}" for note in record["notes"]]
        told = record["summary"]
        finished = cast(Rounding, Finished(method.name, method.version, method.supports, results))
        yield Made(
            tuple(replace(m, by=finished) for m in made),
            {k: told[k] for k in ("toolkit", "package", "release")} | {"environment": record["environment"], "seconds": record["seconds"]},
            told["peak_memory_bytes"],
            method.working_set,
        )


def without_toolkit(spec: QuantizeSpec) -> QuantizeSpec:
    """What is left for the block loop: statistics are the toolkit's affair, text is fed for static activation ranges alone."""
    static = spec.activation is not None and not spec.activation.dynamic
    rules = tuple(replace(r, method=replace(r.method, propagation="original")) for r in spec.rules)
    return replace(spec, rules=rules, calibration=spec.calibration if static else None)


def _the_method(made: tuple[Method, ...]) -> ToolkitMethod:
    """Raises InputError where the rules have no single method of a toolkit."""
    first = made[0]
    if any(m.rule.method != first.rule.method for m in made):
        raise InputError(
            f"{first.by.name} runs once for the whole model: all rules need the same method and parameters; their formats may differ"
        )
    if first.transforms or first.whole is not None:
        raise InputError(f"{first.by.name} quantizes the checkpoint as it is; leave transforms out")
    found = toolkit_of(made)
    assert found is not None
    return found


def _environment(method: ToolkitMethod, context: Context) -> Path:
    if method.toolkit not in context.toolkits:
        raise InputError(f"the request names no environment for {method.toolkit}; set toolkits_dir= (or BITGRID_TOOLKITS)")
    environment = Path(context.toolkits[method.toolkit])
    reason = problem(environment, method.toolkit, method.release)
    if reason is not None:
        raise InputError(f"on this host {reason}")
    return environment


def _run(toolkit: str, environment: Path, spec: QuantizeSpec, job: Job, scratch: Path, context: Context) -> dict[str, Any]:
    """The record of the toolkit's process. Raises ToolkitFailure."""
    for name in ("job", "payload", "code"):
        (scratch / name).mkdir()
    # The toolkit's process finds our code and none of our environment's packages.
    for package in (workers, quant):
        source = Path(str(package.__file__)).resolve().parent
        (scratch / "code" / source.name).symlink_to(source, target_is_directory=True)
    job.write(scratch / "job")
    request, outcomes, output = (scratch / name for name in ("request.json", "outcomes.jsonl", "output.txt"))
    device, variables = _device(str(context.device))
    plain = to_json(spec)
    key = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    stage = StageRequest(key, "quantize", plain, {"job": Input("job", str(scratch / "job"))}, str(scratch))
    hints = replace(context.hints, device=device)
    models = {spec.model.digest: Location("folder", str(job.folder))}
    request.write_text(json.dumps(Request("toolkit", (stage,), models, {}, hints).to_json()))
    command = [str(python_of(environment)), "-m", "workers.toolkits", str(request), "--outcomes", str(outcomes)]
    log.info("%s runs in %s", toolkit, environment)
    with output.open("wb") as out:
        # A session of its own, so that Ctrl-C lets a running stage end; standard input tells it when this process is gone.
        process = subprocess.Popen(
            command,
            cwd=scratch / "code",
            env={**_environment_variables(), **variables},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    for line in _lines(scratch / LOG):
        log.info("%s | %s", toolkit, line)
    told = [Outcome.from_json(json.loads(line)) for line in _lines(outcomes)]
    failure = told[0].failure if told else _ended(code, _lines(output))
    if failure is not None:
        raise ToolkitFailure(toolkit, failure)
    record = told[0].record
    assert record is not None
    return record


def _ended(code: int, output: list[str]) -> Failure:
    """The process ended without an outcome."""
    last = "\n".join(output[-OUTPUT_LINES:])
    log.error("it ended with %d\n%s", code, last)
    if code < 0:
        # The kernel's out-of-memory killer sends 9.
        error_class = ErrorClass.MEMORY if -code == signal.SIGKILL else ErrorClass.INFRASTRUCTURE
        return Failure(error_class, "Killed", f"its process was ended by signal {-code} ({signal.Signals(-code).name})")
    return Failure(ErrorClass.INTERNAL, "Exited", f"its process ended with code {code}: {output[-1] if output else 'it printed nothing'}")


def _device(device: str) -> tuple[str, dict[str, str]]:
    """Device for the toolkit's process, and variables that hide all others from it: toolkits take what they see."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device, {"CUDA_VISIBLE_DEVICES": ""}
    if not index:
        return device, {}
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    return "cuda", {"CUDA_VISIBLE_DEVICES": visible[int(index)] if visible else index}


def _environment_variables() -> dict[str, str]:
    """Of this process, without what would bring its packages along; nothing is downloaded."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV")}
    return {**kept, "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
