"""A small sweep with a time for every stage, so that it can be replayed as it grew: 1 model × {rtn, gptq} × {w4, w2} × 2 tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.results import SkippedCell, StageResult, SweepResult, TaskInfo, VariantResult
from orchestrator.stage import Status
from orchestrator.stats import Delta
from workers.artifact import RECORD, payload_files

T0 = 1_700_000_000.0
KEY = "5eed" * 16
OTHER = "0dd0" * 16


def fixed_delta(variant: StageResult, baseline: StageResult, task: TaskInfo, metric: str) -> Delta:
    value, base = (s.summary["scores"][metric] for s in (variant, baseline))
    return Delta(metric, value, base, value - base, value - base - 0.5, value - base + 0.5, 0.95, 1, "t", 0.5)


def committed(root: Path, kind: str, key: str, at: float, summary: dict[str, Any], spec: dict[str, Any], sweep: str = KEY) -> StageResult:
    folder = root / "objects" / kind / key[:2] / key
    (folder / "payload").mkdir(parents=True, exist_ok=True)
    (folder / "payload" / "table.json").write_text(json.dumps({"key": key, "at": at}))
    if kind == "quantize":
        (folder / "payload" / "model.safetensors").write_bytes(b"\0" * 64)
        blocks = [0, 0, 1, 1, 2, 2]
        layers = {"module": [f"m{i}" for i in range(6)], "block": blocks, "weight_error": [0.01 * (b + 1) for b in blocks]}
        pq.write_table(pa.table(layers), folder / "payload" / "layers.parquet")
    record = {
        "key": key,
        "kind": kind,
        "started": at,
        "ended": at + 10.5,
        "seconds": {"load": 1.0},
        "environment": {"device": "cpu"},
        "notes": [],
        "summary": summary,
        "files": payload_files(folder),
    }
    (folder / RECORD).write_text(json.dumps(record))
    return StageResult(key, kind, f"{kind} {key[:6]}", Status.SUCCEEDED, record, folder / "payload", computed_by=sweep, spec=spec)


def failed(stage: StageResult, message: str = "the Hessian is not positive definite") -> StageResult:
    failure = {"error_class": "numerical", "type": "LinAlgError", "message": message, "log_tail": "line 1\nline 2", "ended": T0 + 500.25}
    return replace(stage, status=Status.FAILED, record=None, payload=None, computed_by=None, failure=failure)


def blocked(stage: StageResult, by: StageResult) -> StageResult:
    return replace(stage, status=Status.DEP_FAILED, record=None, payload=None, computed_by=None, blocked_by=by.key)


def pending(stage: StageResult) -> StageResult:
    return replace(stage, status=Status.PENDING, record=None, payload=None, computed_by=None)


def full_sweep(root: Path, key: str = KEY) -> SweepResult:
    """Everything succeeded."""
    tasks = {
        "text": TaskInfo("text", "perplexity", "perplexity", {"perplexity": False}),
        "kl": TaskInfo("kl", "divergence", "kl", {"kl": False, "top1": True}),
    }
    model = {"digest": "m" * 64}
    variants: list[VariantResult] = []
    clock = T0

    def evaluations(name: str, loss: float) -> dict[str, StageResult]:
        nonlocal clock
        out = {}
        for task, metrics in (("text", {"perplexity": 6.0 + loss}), ("kl", {"kl": loss, "top1": 1.0 - loss / 10})):
            clock += 20
            out[task] = committed(root, "evaluate", f"e-{name}-{task}", clock, {"scores": metrics, "n_items": 8}, {"model": model}, key)
        return out

    axes = {"model": "tiny", "calibration": "self", "replicate": "r0"}
    variants.append(
        VariantResult(
            "v-base", "tiny · unquantized", {**axes, "method": "none", "scheme": "none"}, True, "v-base", None, evaluations("base", 0.0)
        )
    )
    for method, factor in (("rtn", 2.0), ("gptq", 1.0)):
        for bits in (4, 2):
            name = f"{method}-w{bits}"
            clock += 20
            rule = {"pattern": "*", "method": {"rounding": {"name": method, "version": 1}}, "weight": {"bits": bits, "group_size": 64}}
            summary = {"bits_nominal": float(bits), "bits_stored": bits + 0.25, "model_bytes": 2**20 * bits, "weight_error": 0.1 / bits}
            quantize = committed(root, "quantize", f"q-{name}", clock, summary, {"model": model, "rules": [rule]}, key)
            variants.append(
                VariantResult(
                    f"v-{name}",
                    f"tiny · {method} · w{bits}",
                    {**axes, "method": method, "scheme": f"w{bits}"},
                    False,
                    "v-base",
                    quantize,
                    evaluations(name, factor / bits),
                )
            )
    return with_variants(
        SweepResult(
            key=key,
            name="synthetic",
            created=T0 - 5,
            config={"store": "bitgrid-store", "axes": {"method": ["rtn", "gptq"]}},
            provenance={"packages": {"bitgrid": "0.1.0"}, "git": {"commit": "abc123", "dirty": False}, "python": "3.11.0"},
            tasks=tasks,
            variants=(),
            skipped=(SkippedCell({**axes, "method": "gptq", "scheme": "w3", "task": "text"}, "group 64 does not divide 172"),),
        ),
        tuple(variants),
    )


def with_variants(result: SweepResult, variants: tuple[VariantResult, ...]) -> SweepResult:
    stages = {s.key: s for v in variants for s in (v.quantize, *v.evaluations.values()) if s is not None}
    return replace(result, variants=variants, stages=stages)


def change(result: SweepResult, key: str, **changes: Any) -> SweepResult:
    """The sweep with fields of one variant replaced."""
    return with_variants(result, tuple(replace(v, **changes) if v.key == key else v for v in result.variants))


def variant(result: SweepResult, key: str) -> VariantResult:
    return next(v for v in result.variants if v.key == key)


def with_failure(result: SweepResult) -> SweepResult:
    """gptq w2 fails to quantize, so that its evaluations are blocked."""
    v = variant(result, "v-gptq-w2")
    assert v.quantize is not None
    broken = failed(v.quantize)
    return change(result, v.key, quantize=broken, evaluations={t: blocked(s, broken) for t, s in v.evaluations.items()})


def started(result: SweepResult, done: int) -> SweepResult:
    """The sweep as it was when only the first `done` stages had ended."""
    keys = sorted(result.stages, key=lambda k: (result.stages[k].record or {"ended": T0 + 1e6})["ended"])[:done]

    def seen(stage: StageResult) -> StageResult:
        return stage if stage.key in keys else pending(stage)

    return with_variants(
        result,
        tuple(
            replace(
                v, quantize=None if v.quantize is None else seen(v.quantize), evaluations={t: seen(s) for t, s in v.evaluations.items()}
            )
            for v in result.variants
        ),
    )
