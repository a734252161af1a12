"""What a sweep cost: seconds and bytes per kind of stage, reused or run, and what sharing stages saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.results import StageResult, SweepResult
from orchestrator.stage import Status
from workers.specs import StageKind


@dataclass(frozen=True)
class KindCost:
    kind: str
    run: int
    """Committed by this sweep's own drivers."""
    reused: int
    """Committed by another sweep before."""
    failed: int
    """FAILED and DEP_FAILED."""
    waiting: int
    run_seconds: float
    reused_seconds: float
    bytes: int
    """Of the artifacts, reused ones included."""


@dataclass(frozen=True)
class Costs:
    kinds: tuple[KindCost, ...]
    alone_seconds: float
    """What one job per score would have spent, each computing all the stages its score needs."""
    shared_seconds: float
    """What the stages of those scores cost, each counted once, reused ones included."""
    scores: int
    """Finished evaluations, those of the unquantized model included."""

    @property
    def run_seconds(self) -> float:
        return sum(k.run_seconds for k in self.kinds)

    @property
    def saved_seconds(self) -> float:
        """By computing a stage once for all scores that need it."""
        return self.alone_seconds - self.shared_seconds


def stage_bytes(stage: StageResult) -> int:
    return 0 if stage.record is None else sum(int(f["bytes"]) for f in stage.record["files"].values())


def costs(result: SweepResult) -> Costs:
    """What the store tells of a sweep's stages, finished or not."""
    stages = list(result.stages.values())
    scored = [e for v in result.variants for e in v.evaluations.values() if e.record is not None]
    needed = [set(_ancestry(result, e)) for e in scored]
    seconds = {s.key: s.seconds or 0.0 for s in stages}
    return Costs(
        kinds=tuple(_kind(result, k.value, own) for k in StageKind if (own := [s for s in stages if s.kind == k.value])),
        alone_seconds=sum(seconds.get(key, 0.0) for keys in needed for key in sorted(keys)),
        shared_seconds=sum(seconds.get(key, 0.0) for key in sorted(set().union(*needed))),
        scores=len(scored),
    )


def _kind(result: SweepResult, kind: str, stages: list[StageResult]) -> KindCost:
    done = [s for s in stages if s.record is not None]
    reused = [s for s in done if result.reused(s)]
    failed = sum(s.status in (Status.FAILED, Status.DEP_FAILED) for s in stages)
    total, saved = (sum(s.seconds or 0.0 for s in group) for group in (done, reused))
    return KindCost(
        kind=kind,
        run=len(done) - len(reused),
        reused=len(reused),
        failed=failed,
        waiting=len(stages) - len(done) - failed,
        run_seconds=total - saved,
        reused_seconds=saved,
        bytes=sum(stage_bytes(s) for s in done),
    )


def _ancestry(result: SweepResult, stage: StageResult) -> Iterator[str]:
    """Keys of a stage and of everything it was made from."""
    yield stage.key
    for key in (stage.record or {}).get("inputs", {}).values():
        source = result.stages.get(key)
        if source is not None:
            yield from _ancestry(result, source)
