"""Paired comparison of a variant's scores with those of its unquantized baseline.

Both evaluate stages store one row per item (`payload/items.parquet`), in which the same item has the same id. Item noise
that both share cancels in the difference, so its interval is far narrower than that of two separate scores.

* Unit: windows of one document (article, story, generation) are alike, so that they tell less than as many independent ones. Where
  items tell their document and there are enough of them, documents are the unit: each is drawn with all its items, and counts by
  their weight (cluster bootstrap; Field and Welsh 2007). Else items are, as if independent, which is too narrow where they are not.
* Interval: bias-corrected and accelerated bootstrap over units (Efron 1987) of the difference of the *score*
  (perplexity = exp of the weighted mean NLL, every other metric = weighted mean), or, where units are too few to resample, the
  differences that a t test of the linearised difference does not reject.
* p value: paired t test of the linearised difference (over C documents: with the cluster-robust variance, its factor C / (C - 1), and
  C - 1 degrees of freedom). Bootstrap p values cannot fall below 1/resamples, which Holm's correction over a large table would
  always reject as too coarse.
* Multiplicity: Holm (1979) over the p values given together.
* Replicates: `over_replicates` adds how far calibration draws and seeds move a score to how far other text would.

All variants of a task are resampled with the same draws, so equal items give equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from orchestrator.errors import PairingError
from orchestrator.results import StageResult, TaskInfo


class Unit(str, Enum):
    """What is taken as independent, and resampled."""

    DOCUMENT = "document"
    ITEM = "item"


FEWEST_DOCUMENTS = 8
"""Below this a cluster-robust variance is itself too uncertain, and mostly too small; items are the unit."""


@dataclass(frozen=True)
class Delta:
    """Difference of a score to the baseline's, variant minus baseline, in the metric's own unit."""

    metric: str
    value: float
    """Score of the variant, from its items."""
    baseline: float
    delta: float
    low: float
    """Lower end of the interval of `delta`; NaN where there is none."""
    high: float
    confidence: float
    n_items: int
    """Items with a positive weight."""
    method: str
    """bca; percentile (where BCa has no solution); t (few units); identical (every item equal); degenerate (every unit
    differs by the same amount); single (one item: no interval); undefined (a score that is not finite)."""
    p_value: float
    """Two-sided, of no difference; NaN where there is none."""
    unit: Unit = Unit.ITEM
    n_documents: int | None = None
    """Of the items with a positive weight; None where items do not tell."""


def paired_delta(
    variant: StageResult, baseline: StageResult, task: TaskInfo, metric: str, *, confidence: float = 0.95, seed: int = 0
) -> Delta:
    """Difference of `metric` between two evaluate stages of one task, paired by item.

    Args:
        variant, baseline: committed evaluate stages, with `payload`. It is enough that one tells documents: the items are the same.
        task: only named in messages.
        metric: `perplexity` (or `ppl`), or a column of items.parquet.
        confidence: of the interval, between 0 and 1.
        seed: of the resampling; the result depends on nothing else.

    Raises:
        PairingError: a stage without items, items that differ, or a metric the items do not hold.
        CorruptArtifactError: items whose digest differs from the record.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not between 0 and 1")
    for stage in (variant, baseline):
        if stage.payload is None:
            raise PairingError(f"{stage.label} is {stage.status.value} and has no items; only committed stages can be compared")
    from orchestrator.intervals import compare_items  # numpy: planning imports this module and must not pay for it

    where = f"task {task.name}: {variant.label} against {baseline.label}"
    return compare_items(str(variant.payload), str(baseline.payload), metric, confidence, seed, where)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values, none of them NaN, adjusted by Holm's step-down method (1979) for being tested together; in the same order.

    Not by statsmodels, which tests hold this to: importing it, and the garbage collection of the whole process in each of its calls, took
    five seconds of every report."""
    out = [0.0] * len(p_values)
    adjusted = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        adjusted = out[i] = max(adjusted, min(1.0, (len(p_values) - rank) * p_values[i]))
    return out


def over_replicates(
    differences: Sequence[tuple[float, float, float]], *sides: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """The mean of differences between replicates, with the ends of its interval over other text and other draws.

    Args:
        differences: (difference, low, high) over text of each replicate, or pair of replicates, compared.
        sides: scores of all replicates of what is compared, and of what it is compared with. A side of one is taken as exact: nothing
            tells how its draws vary.
        confidence: of the interval, and of those given.

    Text: the mean of the ends. All were resampled with the same draws, and the deviation of a mean is at most the mean of deviations, so
    this is no narrower than the interval of the mean. Draws: Welch's t interval (1947) of the difference of two means. Both together:
    the interval of a sum of two independent estimates from their own (Zou and Donner 2008). NaN where a difference has no interval.
    """
    delta, low, high = (sum(ends) / len(differences) for ends in zip(*differences, strict=True))
    errors = [(_standard_error(s), len(s) - 1) for s in sides if len(s) > 1]
    error = math.hypot(*(e for e, _ in errors))
    if error > 0:
        from scipy.special import stdtrit  # as in `paired_delta`

        freedom = 1 / sum((e / error) ** 4 / n for e, n in errors)
        reach = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
        low, high = delta - math.hypot(delta - low, reach), delta + math.hypot(high - delta, reach)
    return delta, low, high


def _standard_error(values: Sequence[float]) -> float:
    """Of their mean; nothing is squared, which perplexities of broken models would overflow."""
    n = len(values)
    mean = sum(values) / n
    return math.hypot(*(v - mean for v in values)) / math.sqrt(n * (n - 1))
