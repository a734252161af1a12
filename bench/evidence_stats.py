"""Effects with intervals over text and over calibration draws, and verdicts on orderings.

A difference is known per draw r of the calibration text and per window of the evaluation text. Windows are joined to clusters of
consecutive ones, because neighbours share an article or a story; d[r, c] is the mean over cluster c. Draws and text are crossed random
effects, so the variance of the grand mean is estimated as

    var_c(mean_r d) / C + var_r(mean_c d) / R

which counts the residual twice and is therefore on the safe side. t has Satterthwaite's degrees of freedom. A method that reads no
calibration text has one draw, and its difference to another such method has no second term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HOLDS, UNCLEAR, REVERSED = "holds", "not distinguishable", "reversed"
CLUSTER = 4
"""Windows per cluster."""


@dataclass(frozen=True)
class Effect:
    mean: float
    low: float
    high: float
    """The ends of the 95 % interval; NaN where there is none."""
    p: float
    """Two-sided, of no effect; 1 where every value is 0."""
    draws: int
    clusters: int
    p_adjusted: float = math.nan
    """After Holm's correction over the rows given together."""

    @property
    def verdict(self) -> str:
        """Of the hypothesis that the effect is negative."""
        if not self.p_adjusted < 0.05:
            return UNCLEAR
        return HOLDS if self.mean < 0 else REVERSED


def clustered(values: Floats, size: int = CLUSTER) -> Floats:
    """`[R, n]` ▸ means of `size` consecutive windows `[R, C]`; the last cluster takes what is left over."""
    parts = np.array_split(values, [size * i for i in range(1, max(1, values.shape[1] // size))], axis=1)
    return np.stack([p.mean(axis=1) for p in parts], axis=1)


def effect(values: Floats, confidence: float = 0.95, size: int = CLUSTER) -> Effect:
    """values `[R, n]`: per draw and window, in the order of the text. Raises ValueError for fewer than two clusters or a value that is
    not finite."""
    from scipy import stats

    if not np.all(np.isfinite(values)):
        raise ValueError("differences are not finite; leave out the variant that diverged")
    d = clustered(values, size)
    draws, clusters = d.shape
    if clusters < 2:
        raise ValueError(f"{values.shape[1]} windows make {clusters} cluster of {size}; two at least are needed")
    mean = float(d.mean())
    text = float(d.mean(0).var(ddof=1)) / clusters
    draw = float(d.mean(1).var(ddof=1)) / draws if draws > 1 else 0.0
    error = math.sqrt(text + draw)
    if error == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, draws, clusters)
    degrees = (text + draw) ** 2 / (text**2 / (clusters - 1) + (draw**2 / (draws - 1) if draws > 1 else 0.0))
    reach = float(stats.t.ppf(0.5 + confidence / 2, degrees)) * error
    return Effect(mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, degrees)), draws, clusters)


def difference(better: Floats, worse: Floats) -> Floats:
    """`[R, n]` minus `[R', n]`, paired by window and by draw; one draw stands for all of the other's."""
    if len(better) != len(worse) and 1 not in (len(better), len(worse)):
        raise ValueError(f"{len(better)} and {len(worse)} draws cannot be paired; run all replicates of both variants")
    return better - worse


def adjusted(effects: Sequence[Effect]) -> list[Effect]:
    """The same with `p_adjusted` by Holm's method over all of them."""
    if not effects:
        return []
    from statsmodels.stats.multitest import multipletests

    return [replace(e, p_adjusted=float(p)) for e, p in zip(effects, multipletests([e.p for e in effects], method="holm")[1], strict=True)]
