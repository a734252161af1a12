"""The evaluate stage: scores of a variant on one task, and one row per item.

Inputs by role: `quantize`, the artifact of the variant (none: the unquantized model); `reference`, the unquantized model's
own evaluation, for divergence; `kv` and `kv_fisher`, calibration keys and values and their weights, for a KV scheme that needs them.
Payload: items.parquet, and the reference's log-probabilities where this is the reference. Beside its scores an item tells the
document it is of (`document`, an index), the unit that statistics resample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from workers import kv_runs
from workers.context import Context
from workers.errors import InputError
from workers.memory import PeakMemory
from workers.positions import refuses_window
from workers.residency import Residency
from workers.specs import EvaluateSpec, TaskSpec
from workers.tasks import base, divergence, perplexity
from workers.window_logits import window_logits

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TASKS: dict[str, ModuleType] = {task.KIND: task for task in (perplexity, divergence)}
ITEMS = "items.parquet"
P = TypeVar("P", bound="DataclassInstance")


def run_evaluate(spec: EvaluateSpec, inputs: Mapping[str, Path], payload: Path, context: Context, residency: Residency) -> dict[str, Any]:
    """Write items.parquet into `payload`; return {scores, primary, n_items, n_tokens, peak_memory_bytes,
    n_documents where the tokenizer tells them, and kv where the scheme has that part}.

    Raises InputError (unknown task, parameters, too short a text), NumericalError (logits that are not finite),
    CorruptArtifactError.
    """
    check_task(spec.task)
    peak = PeakMemory(context.device, context.kept)
    stage = _Stage(spec, inputs, payload, context, residency)
    result = SCORED_BY[spec.task.kind](stage)
    with context.phase("write"):
        _write_items({**result.columns, **stage.columns}, payload / ITEMS)
    return {
        "scores": result.scores,
        "primary": result.primary,
        "n_items": result.n_items,
        "n_tokens": result.n_tokens,
        "peak_memory_bytes": peak.bytes(),
        **stage.facts,
    }


def check_task(task: TaskSpec) -> None:
    """Raises InputError for a task kind or version this worker does not have."""
    if task.kind not in TASKS:
        raise InputError(f"task kind {task.kind!r}; allowed: {', '.join(sorted(TASKS))}")
    version = TASKS[task.kind].VERSION
    if task.version != version:
        raise InputError(
            f"task {task.kind} version {task.version} is asked for, this worker has version {version}; "
            "driver and workers must run the same bitgrid"
        )


def parse_params(kind: type[P], task: TaskSpec) -> P:
    """The task's parameters as their dataclass. Raises InputError for an unknown name."""
    given = dict(task.params)
    known = {f.name: f.default for f in fields(kind)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"task.params.{unknown[0]} is unknown to {task.kind}; allowed: {', '.join(known)}")
    for name, value in given.items():
        if (value is not None or known[name] is not None) and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"task.params.{name}={value!r}; give a whole number")
    return kind(**given)


@dataclass(frozen=True)
class _Stage:
    spec: EvaluateSpec
    inputs: Mapping[str, Path]
    payload: Path
    context: Context
    residency: Residency
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the record's summary says."""
    columns: dict[str, base.Column] = field(default_factory=dict)
    """What else the items tell."""

    def perplexity(self) -> base.Result:
        params = parse_params(perplexity.Params, self.spec.task)
        windows = self._windows(params.window, params.limit, params.max_windows)
        return self._scored(windows, lambda logits: perplexity.run(logits, windows, self._batch_tokens))

    def divergence(self) -> base.Result:
        params = parse_params(divergence.Params, self.spec.task)
        windows = self._windows(params.window, params.limit, None)
        if self._is_reference:
            budget = self.context.hints.reference_bytes
            return self._scored(windows, lambda logits: divergence.run_reference(logits, windows, self._batch_tokens, self.payload, budget))
        reference = self._reference(windows)
        return self._scored(windows, lambda logits: divergence.run(reference, logits, windows, self._batch_tokens))

    @property
    def _is_reference(self) -> bool:
        return "quantize" not in self.inputs and self.spec.activation is None and self.spec.kv is None

    @property
    def _batch_tokens(self) -> int:
        return self.context.batch_tokens

    def _windows(self, window: int, limit: int | None, max_windows: int | None) -> Tensor:
        """`[n, T]` int64; the documents they are of go into `columns`."""
        text = self.residency.text(self.context, self.spec.model, self.spec.task.text)

        def cut(of_tokens: Tensor) -> Tensor:
            return base.cut(of_tokens, window, limit, max_windows, self.spec.task.windows)

        windows = cut(text.tokens)
        if text.documents is None:
            self.context.notes.append("items do not tell their documents: the model's tokenizer gives no offsets")
        else:
            self.columns["document"] = base.documents_of(cut(text.documents))
            self.facts["n_documents"] = len(set(self.columns["document"]))
        return windows

    def _reference(self, windows: Tensor) -> Iterator[Tensor]:
        """Log-probabilities of the unquantized model, stored or walked side by side."""
        if "reference" not in self.inputs:
            raise InputError("divergence of a variant needs the unquantized model's evaluation as its input `reference`")
        found = divergence.stored(self.inputs["reference"], windows, self._batch_tokens)
        if found is not None:
            return found
        self.context.notes.append("the reference was walked beside the variant: its log-probabilities were above hints.reference_bytes")
        model = self.residency.unquantized(self.context, self.spec.model)
        return divergence.walk(window_logits(model, self.context, nullcontext), windows, self._batch_tokens)

    def _scored(self, windows: Tensor, run: Callable[[base.Logits], base.Result]) -> base.Result:
        spec, artifact = self.spec, self.inputs.get("quantize")
        in_pass = spec.kv if spec.kv is not None and not kv_runs.through_cache(spec.kv) else None
        model = (
            self.residency.unquantized(self.context, spec.model)
            if artifact is None
            else self.residency.variant(self.context, spec.model, artifact)
        )

        def runtime() -> AbstractContextManager[None]:
            return self.residency.runtime(model, artifact, spec.activation, in_pass)

        _check_fits(model, windows)
        if spec.kv is not None:
            self.facts["kv"] = kv_runs.summary(model, spec.kv, windows.shape[1])
        if spec.kv is not None and in_pass is None:
            logits = kv_runs.logits(model, spec.kv, self.inputs, self.context, runtime, spec.activation)
        else:
            logits = window_logits(model, self.context, runtime)
        with self.context.phase("forward"), torch.inference_mode():
            return run(logits)


SCORED_BY: dict[str, Callable[[_Stage], base.Result]] = {perplexity.KIND: _Stage.perplexity, divergence.KIND: _Stage.divergence}
"""Of every kind in TASKS."""


def _check_fits(model: nn.Module, windows: Tensor) -> None:
    """Raises InputError for tokens or positions the model does not have."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise InputError(f"the tokenizer gives token {int(windows.max())}, the model knows {vocabulary}; the tokenizer is another model's")
    refusal = None if config is None else refuses_window(windows.shape[1], config.to_dict())
    if refusal is not None:
        raise InputError(refusal)


def _write_items(columns: Mapping[str, base.Column], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(columns)), path)
