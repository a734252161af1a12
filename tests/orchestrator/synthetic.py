"""A synthetic sweep on disk: real artifact folders with records, items and layers, without running any stage.

`sweep(tmp_path)` is a finished grid; the arguments make it partial, failed, empty or of several models. Numbers follow
simple laws (error doubles per bit removed, GPTQ is better than RTN), so that tests know what to expect.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.results import SkippedCell, StageResult, SweepResult, TaskInfo, VariantResult
from orchestrator.stage import Status
from workers.artifact import RECORD, payload_files

SWEEP = "5e" * 16
OTHER_SWEEP = "0d" * 16
PERPLEXITY = TaskInfo("self_perplexity", "perplexity", "ppl", {"ppl": False, "nll": False})
DIVERGENCE = TaskInfo("self_divergence", "divergence", "kl", {"kl": False, "top1_agreement": True, "flips": False, "nll": False})
METHODS = {"rtn": 1.0, "gptq": 0.5, "awq": 0.6}
"""Error of a method relative to RTN's."""
SCHEMES = {"w8a16_g64": 8, "w4a16_g64": 4, "w3a16_g64": 3, "w2a16_g64": 2}
EPOCH = 1_700_000_000.0


def key_of(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def write_stage(
    root: Path,
    kind: str,
    label: str,
    *,
    summary: Mapping[str, Any],
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    spec: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    seconds: float = 2.0,
    key: str | None = None,
    computed_by: str = SWEEP,
    notes: Sequence[str] = (),
) -> StageResult:
    """A committed stage under `root/objects/`, with true file digests. `tables`: payload file ▸ column ▸ values."""
    key = key or key_of(kind, label)
    folder = root / "objects" / kind / key[:2] / key
    (folder / "payload").mkdir(parents=True, exist_ok=True)
    for name, columns in (tables or {}).items():
        pq.write_table(pa.table(dict(columns)), folder / "payload" / name)
    record = {
        "key": key,
        "kind": kind,
        "inputs": dict(inputs or {}),
        "files": payload_files(folder),
        "started": EPOCH,
        "ended": EPOCH + seconds,
        "seconds": {"load": seconds / 4, "run": seconds * 3 / 4},
        "environment": {"python": "3.11.2", "torch": "2.13.0", "device": "cpu"},
        "hints": {"device": "cpu"},
        "notes": list(notes),
        "summary": dict(summary),
    }
    (folder / RECORD).write_text(json.dumps(record, allow_nan=True))
    made = StageResult(key, kind, label, Status.SUCCEEDED, record=record, payload=folder / "payload", computed_by=computed_by)
    return replace(made, spec=dict(spec or {}))


def perplexity_items(seed: int, degradation: float, n: int = 60) -> dict[str, Any]:
    """NLL of `n` windows: shared text difficulty, plus `degradation` nats per token on average."""
    text = np.random.default_rng([1, n]).normal(3.0, 0.4, n)
    noise = np.random.default_rng([2, seed, n]).normal(1.0, 0.3, n)
    tokens = np.full(n, 512)
    return {"id": [f"w{i:04d}" for i in range(n)], "n_tokens": tokens, "nll": text + degradation * noise, "weight": tokens - 1.0}


def divergence_items(seed: int, degradation: float, n: int = 60) -> dict[str, Any]:
    rng = np.random.default_rng([3, seed, n])
    tokens = np.full(n, 512)
    kl = degradation * rng.gamma(4.0, 0.25, n)
    agreement = np.clip(1 - np.sqrt(degradation) * rng.uniform(0.1, 0.3, n), 0, 1) if degradation else np.ones(n)
    return {
        "id": np.arange(n),
        "n_tokens": tokens,
        "weight": tokens - 1.0,
        "kl": kl,
        "top1_agreement": agreement,
        "flips": 1 - agreement,
        "nll": 3.0 + kl,
    }


def scores_of(items: Mapping[str, Any]) -> dict[str, float]:
    weight = np.asarray(items["weight"])
    means = {k: float(np.average(v, weights=weight)) for k, v in items.items() if k not in ("id", "n_tokens", "weight", "document")}
    return means if "kl" in means else {"ppl": float(np.exp(means["nll"])), **means}


def evaluate_stage(root: Path, label: str, task: TaskInfo, items: Mapping[str, Any], **more: Any) -> StageResult:
    with np.errstate(over="ignore"):
        scores = scores_of(items)
    summary = {"scores": scores, "primary": task.primary, "n_items": len(items["id"]), "n_tokens": int(np.sum(items["n_tokens"]))}
    return write_stage(root, "evaluate", label, summary=summary, tables={"items.parquet": items}, **more)


def quantize_stage(root: Path, label: str, bits: int, error: float, *, blocks: int = 3, **more: Any) -> StageResult:
    modules = [(f"model.layers.{b}.{m}", b) for b in range(blocks) for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    n = len(modules)
    layer_error = error * (1 + np.arange(n) / n)
    layers = {
        "module": [m for m, _ in modules],
        "block": [b for _, b in modules],
        "rows": [256] * n,
        "cols": [256] * n,
        "weight_error": layer_error,
        "output_error": [None if i == 0 else float(e) / 2 for i, e in enumerate(layer_error)],
        "bits_nominal": [float(bits)] * n,
        "bits_stored": [bits + 0.5] * n,
        "damp": [0.01] * n,
        "notes": [""] * n,
        "seconds": [0.1] * n,
    }
    summary = {
        "bits_nominal": float(bits),
        "bits_stored": bits + 0.5,
        "model_bytes": int(1_000_000 + 600_000 * (bits + 0.5)),
        "n_linears": n,
        "coverage": {"asked": n, "quantized": n, "kept": []},
        "peak_memory_bytes": 50_000_000,
        "flags": [],
        "weight_error": float(layer_error.mean()),
    }
    return write_stage(root, "quantize", label, summary=summary, tables={"layers.parquet": layers}, **more)


def failed(stage: StageResult, message: str = "GPTQ: the Hessian is not positive definite") -> StageResult:
    failure = {
        "error_class": "numerical",
        "type": "NumericalError",
        "message": message,
        "log_tail": "line 1\nline 2 <script>alert(1)</script>",
        "attempt": 1,
        "ended": EPOCH + 9,
    }
    return replace(stage, status=Status.FAILED, record=None, payload=None, failure=failure, computed_by=None)


def pending(stage: StageResult) -> StageResult:
    return replace(stage, status=Status.PENDING, record=None, payload=None, computed_by=None)


def sweep(
    root: Path,
    *,
    models: Sequence[str] = ("wikitext_llama",),
    methods: Sequence[str] = ("rtn", "gptq", "awq"),
    schemes: Sequence[str] = tuple(SCHEMES),
    tasks: Sequence[TaskInfo] = (PERPLEXITY, DIVERGENCE),
    fail: Collection[tuple[str, str]] = (),
    wait: Collection[tuple[str, str]] = (),
    reused: Collection[tuple[str, str]] = (),
    replicates: Sequence[str] = ("r0",),
    skipped: Sequence[SkippedCell] = (),
    n_items: int = 60,
    documents: int | None = None,
    name: str = "demo",
) -> SweepResult:
    """A sweep of models × methods × schemes × replicates × tasks with its baselines.

    `fail`, `wait`, `reused`: (method, scheme) pairs whose quantize stage failed (evaluations DEP_FAILED), has not run, or
    was computed by another sweep. `documents`: how many the items are of, in order; None: they do not tell.
    """
    stages: dict[str, StageResult] = {}
    variants: list[VariantResult] = []

    def put(stage: StageResult) -> StageResult:
        stages[stage.key] = stage
        return stage

    def evaluate(label: str, task: TaskInfo, seed: int, degradation: float, **more: Any) -> StageResult:
        make = perplexity_items if task.kind == "perplexity" else divergence_items
        items = make(seed, degradation, n_items)
        if documents is not None:
            items["document"] = np.arange(n_items) * documents // n_items
        return put(evaluate_stage(root, f"{label} {task.name}", task, items, **more))

    for model in models:
        digest = key_of("model", model)
        spec = {"model": {"digest": digest}}
        axes = {"model": model, "method": "none", "scheme": "none", "calibration": "none", "replicate": "none"}
        base_key = key_of(model, "unquantized")
        hessian = put(write_stage(root, "calibrate", f"calibrate {model} hessian", summary={"tokens": 65536}, spec=spec, seconds=8.0))
        evaluations = {t.name: evaluate(f"evaluate {model} unquantized", t, 0, 0.0, spec=spec) for t in tasks}
        variants.append(VariantResult(base_key, f"{model} · unquantized", axes, True, base_key, None, evaluations))
        for seed, (method, scheme, replicate) in enumerate((m, s, r) for m in methods for s in schemes for r in replicates):
            bits = SCHEMES.get(scheme, 4)
            degradation = METHODS.get(method, 1.0) * 0.02 * 4.0 ** (4 - bits)
            label = f"{model} {method} {scheme}" + (f" {replicate}" if len(replicates) > 1 else "")
            owner = OTHER_SWEEP if (method, scheme) in reused else SWEEP
            weight = {"bits": bits, "granularity": "group", "group_size": 64}
            quantize = quantize_stage(
                root,
                f"quantize {label}",
                bits,
                degradation,
                spec={**spec, "rules": [{"pattern": "*", "weight": weight}]},
                inputs={"hessian": hessian.key} if method != "rtn" else {},
                seconds=3.0,
                computed_by=owner,
            )
            evaluations = {
                t.name: evaluate(f"evaluate {label}", t, seed, degradation, spec=spec, inputs={"quantize": quantize.key}) for t in tasks
            }
            if (method, scheme) in fail:
                quantize = failed(quantize)
                evaluations = {k: replace(pending(v), status=Status.DEP_FAILED, blocked_by=quantize.key) for k, v in evaluations.items()}
            elif (method, scheme) in wait:
                quantize = pending(quantize)
                evaluations = {k: pending(v) for k, v in evaluations.items()}
            stages.update({s.key: s for s in (quantize, *evaluations.values())})
            axes = {"model": model, "method": method, "scheme": scheme, "calibration": "self_text", "replicate": replicate}
            label = f"{model} · {method} · {scheme}" + (f" · {replicate}" if len(replicates) > 1 else "")
            variants.append(VariantResult(key_of(label), label, axes, False, base_key, quantize, evaluations))
    return SweepResult(
        key=SWEEP,
        name=name,
        created=EPOCH,
        config={"models_dir": None, "store": "bitgrid-store", "axes": {"model": list(models), "method": list(methods)}},
        provenance={
            "bitgrid": "0.1.0",
            "git": "0123abc",
            "git_dirty": False,
            "python": "3.11.2",
            "platform": "Linux",
            "packages": {"torch": "2.13.0"},
            "overrides": ["method=rtn,gptq,awq"],
        },
        tasks={t.name: t for t in tasks},
        variants=tuple(variants),
        stages=stages,
        skipped=tuple(skipped),
        model_names={key_of("model", m): m for m in models},
        model_bytes={key_of("model", m): 12_000_000 for m in models},
    )
