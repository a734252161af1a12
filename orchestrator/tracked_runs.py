"""What MLflow should show of a sweep, as plain data: one run for the sweep, one for each variant that has begun.

Pure: a description depends on the `SweepResult` alone, never on the clock or on what MLflow holds already. So writing it
twice changes nothing, and a deleted database is rebuilt with the same names, params, metrics, tags, status and artifacts.

| kind   | holds | names |
|---|---|---|
| params | the grid's axes | `model.name`, `quant.method`, `quant.scheme`, `quant.bits`, `quant.budget`, `calibration.name`, `replicate` |
| metrics | numbers to sort and plot | `eval/<task>/<metric>`, `delta/<task>/<metric>` and `_low`, `_high`, `size/…`, `time/…` |
| tags | identity, provenance, state | `bitgrid.*` |
| artifacts | configuration, small tables, the record of each stage | `config/`, `tables/`, `stages/` |

The sweep's own counters change while it runs. MLflow never forgets a metric, so they are tags; the one metric of a sweep
is the series of finished stages, whose past does not change.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.mlflow_names import param_value, tag_key, tag_value
from orchestrator.results import StageResult, SweepResult, VariantResult
from orchestrator.stage import Status
from orchestrator.stats import paired_delta
from orchestrator.tracked_files import ArtifactFile, config_file, given_files, stage_files
from orchestrator.tracked_metrics import DeltaOf, Point, ms, progress, variant_points
from workers.specs import MeasureSpec, from_json

SCHEMA = 5
"""Version of the form below; a change rewrites every run once."""
SWEEP_RUN = "sweep"
"""Key of the sweep's own run among its variants' keys."""


class Phase(Enum):
    """Whether a driver is at work on the sweep: what has not run is still to come, or was left undone."""

    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class RunDescription:
    key: str
    """Variant key, or `SWEEP_RUN`."""
    name: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED, as MLflow names them."""
    start_ms: int
    end_ms: int | None
    params: Mapping[str, str]
    metrics: tuple[Point, ...]
    tags: Mapping[str, str]
    artifacts: tuple[ArtifactFile, ...]

    @cached_property
    def content(self) -> str:
        """Digest of everything above."""
        points = [[p.name, _number(p.value), p.timestamp_ms, p.step] for p in self.metrics]
        files = [[a.path, a.sha256] for a in self.artifacts]
        scalars = [SCHEMA, self.key, self.name, self.status, self.start_ms, self.end_ms]
        return _digest([*scalars, dict(self.params), points, dict(self.tags), files])


def content_digest(result: SweepResult, phase: Phase = Phase.ENDED) -> str:
    """Digest of all that the runs of a sweep are made from; equal digests need no sync. Reads no file.

    Files attached to the sweep's run are not part of it, but what only the report tells of a sweep is: why cells were skipped.
    """
    stages = {s.key: s for v in result.variants for s in _stages(v)} | dict(result.stages)
    described = [[v.key, v.label, dict(v.axes), v.baseline_key, list(v.flags), [s.key for s in _stages(v)]] for v in result.variants]
    tasks = {n: [t.primary, dict(t.higher_is_better)] for n, t in result.tasks.items()}
    states = {k: [s.status.value, s.record, s.spec, s.failure, s.blocked_by, s.computed_by] for k, s in sorted(stages.items())}
    whole = [result.key, result.name, result.created, result.config, result.provenance, tasks, [[s.axes, s.reason] for s in result.skipped]]
    return _digest([SCHEMA, phase.value, *whole, described, states])


def describe_sweep(result: SweepResult, phase: Phase, attachments: Mapping[str, Path] | None = None) -> RunDescription:
    """The parent run. `attachments`: artifact path ▸ file (report.html, plan.json); a missing file is left out."""
    variants = [_variant_status(v, phase) for v in result.variants]
    stages = list(result.stages.values())
    if phase is Phase.RUNNING:
        status = "RUNNING"
    elif "FAILED" in variants or any(s.status in (Status.FAILED, Status.DEP_FAILED) for s in stages):
        status = "FAILED"
    else:
        status = "KILLED" if "KILLED" in variants else "FINISHED"
    ended = [t for s in stages if (t := s.ended) is not None and not result.reused(s)]
    end = max([result.created, *ended])
    count = {s: sum(x.status is s for x in stages) for s in Status}
    done = count[Status.SUCCEEDED] + count[Status.CACHED]
    failed = [v.label for v, s in zip(result.variants, variants, strict=True) if s == "FAILED"]
    tags = {
        **_identity_tags(result, "sweep"),
        "bitgrid.stages": str(len(stages)),
        "bitgrid.stages_done": str(done),
        "bitgrid.stages_reused": str(sum(result.reused(s) for s in stages)),
        "bitgrid.stages_failed": str(count[Status.FAILED]),
        "bitgrid.stages_dep_failed": str(count[Status.DEP_FAILED]),
        "bitgrid.variants": str(len(variants)),
        "bitgrid.variants_failed": str(len(failed)),
        "bitgrid.cells_skipped": str(len(result.skipped)),
        "mlflow.note.content": _sweep_note(result, len(stages), done, failed),
    }
    return RunDescription(
        key=SWEEP_RUN,
        name=f"{result.name} {result.key[:8]}",
        status=status,
        start_ms=ms(result.created),
        end_ms=None if status == "RUNNING" else ms(end),
        params={},
        metrics=progress(result) if phase is Phase.ENDED else (),
        tags={tag_key(k): tag_value(v) for k, v in tags.items()},
        artifacts=(
            config_file("config/sweep.yaml", {"sweep": result.key, "name": result.name, "config": result.config}),
            config_file("config/provenance.yaml", result.provenance),
            *given_files(attachments or {}),
        ),
    )


def run_keys(result: SweepResult) -> set[str]:
    """Keys of the runs of an ended sweep: its own, and those of the variants that have begun."""
    return {SWEEP_RUN, *(v.key for v in result.variants if any(_ended_or_blocked(s, result) is not None for s in _stages(v)))}


def describe_variant(result: SweepResult, variant: VariantResult, phase: Phase, delta_of: DeltaOf = paired_delta) -> RunDescription | None:
    """A variant's run; None before the first of its stages has ended, for there is nothing to say yet."""
    ended = {s.key: t for s in _stages(variant) if (t := _ended_or_blocked(s, result)) is not None}
    if not ended:
        return None
    own = [s for s in _stages(variant) if s.key in ended]
    # Reused stages may be weeks old: the run's time span is of what this sweep computed, where it computed anything.
    fresh = [s for s in own if not result.reused(s)] or own
    status = _variant_status(variant, phase)
    baseline = next((v for v in result.variants if v.key == variant.baseline_key), None)
    points, notes = variant_points(variant, baseline, result.tasks, delta_of, result.model_bytes)
    tags = {
        **_identity_tags(result, "variant"),
        "bitgrid.variant_key": variant.key,
        "bitgrid.baseline_key": variant.baseline_key,
        "bitgrid.is_baseline": str(variant.is_baseline).lower(),
        **{f"bitgrid.stage.{role}": s.key for role, s in _roles(variant)},
        **_state_tags(variant, result, notes),
    }
    settings = {
        "axes": dict(variant.axes),
        "variant": variant.key,
        "stages": {role: {"key": s.key, "spec": s.spec} for role, s in _roles(variant)},
    }
    artifacts = [config_file("config/variant.yaml", settings)]
    for role, stage in _roles(variant):
        artifacts += stage_files(role, stage)
    return RunDescription(
        key=variant.key,
        name=variant.label,
        status=status,
        start_ms=min(ms(_started(s, ended[s.key])) for s in fresh),
        end_ms=None if status == "RUNNING" else max(ms(ended[s.key]) for s in fresh),
        params=_params(variant),
        metrics=points,
        tags={tag_key(k): tag_value(v) for k, v in tags.items()},
        artifacts=tuple(artifacts),
    )


def _ended_or_blocked(stage: StageResult, result: SweepResult) -> float | None:
    blocker = result.stages.get(stage.blocked_by) if stage.status is Status.DEP_FAILED and stage.blocked_by else None
    return (blocker or stage).ended


def _started(stage: StageResult, ended: float) -> float:
    return ended if stage.record is None else float(stage.record["started"])


def _roles(variant: VariantResult) -> Iterable[tuple[str, StageResult]]:
    if variant.quantize is not None:
        yield "quantize", variant.quantize
    for task in sorted(variant.evaluations):
        yield f"evaluate.{task}", variant.evaluations[task]
    if variant.measure is not None:
        yield "measure", variant.measure


def _stages(variant: VariantResult) -> list[StageResult]:
    return [s for _, s in _roles(variant)]


def _variant_status(variant: VariantResult, phase: Phase) -> str:
    states = {s.status for s in _stages(variant)}
    if states & {Status.FAILED, Status.DEP_FAILED}:
        return "FAILED"
    if all(s.finished for s in states) and Status.CANCELLED not in states:
        return "FINISHED"
    return "RUNNING" if phase is Phase.RUNNING else "KILLED"


def _params(variant: VariantResult) -> dict[str, str]:
    axes = variant.axes
    params: dict[str, Any] = {
        "model.name": axes.get("model"),
        "quant.method": axes.get("method"),
        "quant.scheme": axes.get("scheme"),
        "calibration.name": axes.get("calibration"),
        "replicate": axes.get("replicate"),
    }
    specs = {role: s.spec for role, s in _roles(variant)}
    quantize = specs.get("quantize", {})
    weights = [r["weight"] for r in quantize.get("rules", []) if r.get("weight")]
    for name in ("bits", "group_size", "symmetric"):
        # A mixed variant has several: all are named, in the order of the rules.
        values = list(dict.fromkeys(w.get(name, "false" if name == "symmetric" else "none") for w in weights))
        if values:
            params[f"quant.{name}"] = ",".join(str(v).lower() for v in values)
    if quantize.get("auto"):
        # Its rule only holds the place of the widths that the stage itself chooses.
        params.update({"quant.bits": "auto", "quant.budget": quantize["auto"]["budget"]})
    for part in ("activation", "kv"):
        found = next((s[part] for s in specs.values() if s.get(part)), None)
        if found:
            params[f"quant.{part}_bits"] = found["bits"]
    params["model.dtype"] = next((s["model"].get("dtype", "float32") for s in specs.values() if "model" in s), None)
    return {k: param_value(v) for k, v in params.items() if v is not None}


def _identity_tags(result: SweepResult, kind: str) -> dict[str, str]:
    p = result.provenance
    git = p["git"] if isinstance(p.get("git"), Mapping) else {}
    tags = {
        "bitgrid.kind": kind,
        "bitgrid.schema": str(SCHEMA),
        "bitgrid.sweep_key": result.key,
        "bitgrid.sweep_name": result.name,
        "mlflow.source.name": "bitgrid",
        "mlflow.source.type": "LOCAL",
    }
    known = {
        "version": (p.get("packages") or {}).get("bitgrid"),
        "git_commit": git.get("commit"),
        "git_dirty": git.get("dirty"),
        "python": p.get("python"),
    }
    tags.update({f"bitgrid.{k}": str(v).lower() if isinstance(v, bool) else str(v) for k, v in known.items() if v is not None})
    if git.get("commit"):
        tags["mlflow.source.git.commit"] = str(git["commit"])
    return tags


def _state_tags(variant: VariantResult, result: SweepResult, notes: Iterable[str]) -> dict[str, str]:
    tags, said = {}, list(notes)
    if variant.all_flags:
        tags["bitgrid.flags"] = "; ".join(variant.all_flags)
    reused = [role for role, s in _roles(variant) if result.reused(s)]
    if reused:
        tags["bitgrid.reused"] = ", ".join(reused)
    for role, stage in _roles(variant):
        record = stage.record or {}
        said += [f"{role}: {n}" for n in record.get("notes", ())]
        surroundings = record.get("environment") or {}
        tags.update({f"bitgrid.{n}.{role}": str(surroundings[n]) for n in ("device", "device_name") if surroundings.get(n)})
    if variant.measure is not None and variant.measure.record is not None:
        from orchestrator.report.speed import stated  # the report loads more than a tracker may before it writes

        tags["bitgrid.measured"] = stated(from_json(MeasureSpec, variant.measure.spec), variant.measure.summary.get("threads"))
    failed = [(role, s) for role, s in _roles(variant) if s.status in (Status.FAILED, Status.DEP_FAILED)]
    if failed:
        # The cause: a stage of its own that failed, or the one that blocks it.
        role, stage = next(((r, s) for r, s in failed if s.status is Status.FAILED), failed[0])
        cause = stage if stage.failure else result.stages.get(stage.blocked_by or "", stage)
        failure = cause.failure or {}
        tags["bitgrid.failed_stages"] = ", ".join(f"{r} {s.status.value}" for r, s in failed)
        tags["bitgrid.error_stage"] = cause.label
        tags["bitgrid.error_class"] = str(failure.get("error_class", "unknown"))
        tags["bitgrid.error_type"] = str(failure.get("type", "unknown"))
        tags["bitgrid.error_message"] = str(failure.get("message", "no record of the failure was kept"))
        tags["mlflow.note.content"] = _failure_note(cause, failure)
    if said:
        tags["bitgrid.notes"] = "\n".join(said)
    return tags


def _failure_note(cause: StageResult, failure: Mapping[str, Any]) -> str:
    kind = f"{failure.get('error_class', 'unknown')}, {failure.get('type', 'unknown')}"
    head = f"**{cause.label} failed** ({kind}): {failure.get('message', '')}"
    tail = str(failure.get("log_tail") or "").replace("```", "'''")
    return head + (f"\n\n```\n{tail[-4000:]}\n```" if tail else "")


def _sweep_note(result: SweepResult, stages: int, done: int, failed: list[str]) -> str:
    lines = [f"Sweep `{result.key}`: {len(result.variants)} variants on {', '.join(sorted(result.tasks))}; {done} of {stages} stages done."]
    if result.skipped:
        lines.append(f"{len(result.skipped)} cells were skipped; the report gives the reasons.")
    if failed:
        lines += [f"{len(failed)} variants failed:", *(f"- {label}" for label in failed[:50])]
    return "\n\n".join(lines[:2]) + ("\n\n" + "\n".join(lines[2:]) if lines[2:] else "")


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str, separators=(",", ":")).encode()).hexdigest()
