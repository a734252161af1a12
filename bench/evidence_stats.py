"""Effects with intervals over text and over calibration draws, and verdicts on orderings.

A difference is known per draw r of the calibration text and per window of the evaluation text. Windows are alike where they are of one
article or story, so these are the clusters; where items do not tell them, or they are fewer than FEWEST_DOCUMENTS, clusters are blocks of
consecutive windows. d[r, c] is the mean over cluster c, s[c] its share of the windows, m = mean_r Σ_c s d the grand mean. Draws and text
are crossed random effects, so the variance of m is estimated as

    C / (C - 1) Σ_c (s (mean_r d - m))² + var_r(Σ_c s d) / R

whose first term is var_c / C for clusters of one size. It counts the residual twice and is therefore on the safe side. t has
Satterthwaite's degrees of freedom. A method that reads no calibration text has one draw, and its difference to another such method has no
second term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.stats import FEWEST_DOCUMENTS, holm

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

HOLDS, UNCLEAR, REVERSED = "holds", "not distinguishable", "reversed"
BLOCK = 4
"""Windows per cluster where documents are not known."""
DOCUMENTS, BLOCKS = "documents", "blocks"


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
    clusters_are: str = BLOCKS
    """documents, or blocks of consecutive windows."""

    @property
    def verdict(self) -> str:
        """Of the hypothesis that the effect is negative."""
        if not self.p_adjusted < 0.05:
            return UNCLEAR
        return HOLDS if self.mean < 0 else REVERSED


@dataclass(frozen=True, eq=False)
class Clusters:
    are: str
    of: Labels
    """Of each window `[n]`, 0 to C - 1."""
    reason: str = ""
    """Why they are not documents."""


def clusters(windows: int, documents: Floats | None = None) -> Clusters:
    """Of windows in the order of the text, whose documents are `documents` `[n]`. The last block takes what is left over."""
    reason = "windows do not tell their documents"
    if documents is not None:
        names, of = np.unique(documents, return_inverse=True)
        if len(names) >= FEWEST_DOCUMENTS:
            return Clusters(DOCUMENTS, of.astype(np.int64))
        reason = f"windows are of {len(names)} documents, fewer than {FEWEST_DOCUMENTS}"
    return Clusters(BLOCKS, np.minimum(np.arange(windows) // BLOCK, max(1, windows // BLOCK) - 1), reason)


def clustered(values: Floats, of: Labels) -> tuple[Floats, Floats]:
    """values `[R, n]` ▸ means over clusters `[R, C]`, and the clusters' shares of the windows `[C]`."""
    count = np.bincount(of)
    return np.stack([np.bincount(of, row) for row in values]) / count, count / of.size


def effect(values: Floats, documents: Floats | None = None) -> Effect:
    """values `[R, n]`: per draw and window, in the order of the text. Raises ValueError for fewer than two clusters or a value that is
    not finite."""
    from scipy import stats

    if not np.all(np.isfinite(values)):
        raise ValueError("differences are not finite; leave out the variant that diverged")
    found = clusters(values.shape[1], documents)
    d, share = clustered(values, found.of)
    draws, count = d.shape
    if count < 2:
        raise ValueError(f"{values.shape[1]} windows make {count} cluster of {BLOCK}; two at least are needed")
    means = d @ share  # [R]
    mean = float(means.mean())
    off = share * (d.mean(0) - mean)
    text = count / (count - 1) * float(off @ off)
    draw = float(means.var(ddof=1)) / draws if draws > 1 else 0.0
    error = math.sqrt(text + draw)
    if error == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, draws, count, clusters_are=found.are)
    degrees = (text + draw) ** 2 / (text**2 / (count - 1) + (draw**2 / (draws - 1) if draws > 1 else 0.0))
    reach = float(stats.t.ppf(0.975, degrees)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, degrees))
    return Effect(mean, mean - reach, mean + reach, p, draws, count, clusters_are=found.are)


def difference(better: Floats, worse: Floats) -> Floats:
    """`[R, n]` minus `[R', n]`, paired by window and by draw; one draw stands for all of the other's."""
    if len(better) != len(worse) and 1 not in (len(better), len(worse)):
        raise ValueError(f"{len(better)} and {len(worse)} draws cannot be paired; run all replicates of both variants")
    return better - worse


def adjusted(effects: Sequence[Effect]) -> list[Effect]:
    """The same with `p_adjusted` by Holm's method over all of them."""
    return [replace(e, p_adjusted=p) for e, p in zip(effects, holm([e.p for e in effects]), strict=True)]
