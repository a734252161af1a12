"""The numbers behind `orchestrator.stats`: items read and paired, and the interval and p value of their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import PairingError
from orchestrator.stats import FEWEST_DOCUMENTS, Delta, Unit

Floats = NDArray[np.float64]
DOCUMENT = "document"
"""Column of items.parquet; items of before it was there are read too."""

RESAMPLES = 2000
FEWEST_TO_RESAMPLE = 12
"""Below this many units the bootstrap's own coverage is poor; the t interval is used."""
PERPLEXITIES = ("perplexity", "ppl")
SAME_TASK = "evaluate both with the same task settings"
KEPT_COMPARISONS = 1 << 17
"""Of the latest: table, report and tracking each ask for all of a sweep, which in a grid of 2,000 variants and 10 tasks are 60,000."""
KEPT_DRAWS = 256 << 20
"""Bytes. Tables go variant by variant, so that the draws of all tasks are wanted in turn; to make some takes as long as 100 comparisons."""
_drawn: dict[tuple[int, int, int], NDArray[np.uint8]] = {}
"""(Units, seed, resamples) ▸ draws, the last used at the end."""
_drawing = Lock()
_CHUNK = 250
"""Resamples multiplied at once: bounds memory for tasks of many thousand items."""


@dataclass(frozen=True, eq=False)
class _Items:
    ids: Any
    """Arrow array."""
    columns: dict[str, Floats]


@lru_cache(maxsize=512)
def _items(payload: str) -> _Items:
    """Items of one artifact. A payload folder is named by its content key, so it never changes under the cache."""
    import pyarrow.parquet as pq

    from workers.artifact import payload_path

    table = pq.ParquetFile(payload_path(Path(payload).parent, "items.parquet")).read(use_threads=False)
    missing = {"id", "weight"} - set(table.column_names)
    if missing:
        raise PairingError(f"{payload}/items.parquet has no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    numbers = {}
    for name in table.column_names:
        column = table.column(name)
        if name != "id" and str(column.type).startswith(("int", "uint", "float", "double", "half", "bool")):
            numbers[name] = column.to_numpy().astype(np.float64)
    return _Items(table.column("id").combine_chunks(), numbers)


@lru_cache(maxsize=KEPT_COMPARISONS)
def compare_items(variant: str, baseline: str, metric: str, confidence: float, seed: int, where: str) -> Delta:
    """`paired_delta` of two payload folders; `where` names them in errors."""
    a, b = _items(variant), _items(baseline)
    order = _pairing(a, b, where)
    column = "nll" if metric in PERPLEXITIES else metric
    for items in (a, b):
        if column not in items.columns:
            have = sorted(set(items.columns) - {"weight", "n_tokens", DOCUMENT})
            raise PairingError(f"{where}: items hold no {column!r} for metric {metric!r}; they hold {', '.join(have)}")
    weight, other_weight = a.columns["weight"], b.columns["weight"][order]
    if not np.array_equal(weight, other_weight):
        raise PairingError(f"{where}: the same ids carry different weights, so the items are not the same text; {SAME_TASK}")
    documents, other = a.columns.get(DOCUMENT), b.columns.get(DOCUMENT)
    if other is not None:
        other = other[order]
        if documents is not None and not np.array_equal(documents, other):
            raise PairingError(f"{where}: the same ids are of different documents, so the items are not the same text; {SAME_TASK}")
    documents = other if documents is None else documents
    return compare(a.columns[column], b.columns[column][order], weight, metric, documents=documents, confidence=confidence, seed=seed)


def _pairing(a: _Items, b: _Items, where: str) -> Any:
    """Index into b's rows that puts them in a's order."""
    if a.ids.equals(b.ids):
        return slice(None)
    ours, theirs = a.ids.to_pylist(), b.ids.to_pylist()
    position = {item: i for i, item in enumerate(theirs)}
    if len(position) != len(theirs) or len(set(ours)) != len(ours):
        raise PairingError(f"{where}: item ids repeat, so items cannot be paired; {SAME_TASK}")
    alone = [i for i in ours if i not in position]
    if alone or len(ours) != len(theirs):
        example = alone[0] if alone else next(i for i in theirs if i not in set(ours))
        raise PairingError(
            f"{where}: the items are not the same ({len(ours)} against {len(theirs)}; {example!r} is in one only); {SAME_TASK}"
        )
    return np.array([position[i] for i in ours])


def compare(
    variant: Floats,
    baseline: Floats,
    weight: Floats,
    metric: str,
    *,
    documents: Floats | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Delta:
    """The same on arrays: per-item values `[n]` (NLL for perplexity), weights `[n]`, and documents `[n]` where they are known."""
    used = weight > 0
    v, b, w = variant[used], baseline[used], weight[used]
    n = int(v.size)
    of = None if documents is None else np.unique(documents[used], return_inverse=True)[1]
    n_documents = None if of is None else len(set(of.tolist()))
    unit = Unit.DOCUMENT if n_documents is not None and n_documents >= FEWEST_DOCUMENTS else Unit.ITEM
    score = np.exp if metric in PERPLEXITIES else np.positive
    nan = math.nan

    def result(method: str, low: float = nan, high: float = nan, p: float = nan) -> Delta:
        ends = float(low), float(high), confidence
        return Delta(metric, float(value), float(base), float(delta), *ends, n, method, float(p), unit=unit, n_documents=n_documents)

    with np.errstate(over="ignore", invalid="ignore"):
        mean_v, mean_b = (float(np.average(x, weights=w)) if n else nan for x in (v, b))
        value, base = score(mean_v), score(mean_b)
        delta = value - base
        if not (np.isfinite(value) and np.isfinite(base)):
            return result("undefined")
        if not np.any(v - b):
            return result("identical", 0.0, 0.0, 1.0)
        if n == 1:
            return result("single")
        if unit is Unit.DOCUMENT:
            assert of is not None
            v, b, w = _together(v, b, w, of)
        difference = v - b
        # Beside the values themselves: divergences of nearly lossless variants are far below 1.
        if np.ptp(difference) <= 1e-12 * max(float(np.abs(v).max()), float(np.abs(b).max())):
            # No spread to resample. Under "no difference" each sign was a coin toss: the exact sign-flip p value.
            return result("degenerate", delta, delta, 2.0 ** (1 - v.size))
        p = _t_test(difference, w)
        if v.size < FEWEST_TO_RESAMPLE:
            return result("t", *_t_interval(v, b, w, metric, confidence), p)
        method, low, high = _bootstrap(v, b, w, score, float(delta), confidence, seed, resamples)
    return result(method, low, high, p)


def _together(v: Floats, b: Floats, w: Floats, of: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    """Items `[n]` of documents `of` `[n]`, 0 to C - 1 ▸ weighted means of both scores, and weights, per document `[C]`.

    Every statistic here is one of weighted sums, so that to draw documents with all their items is to draw these rows."""
    if of.max() + 1 == of.size:
        return v, b, w
    weight = np.bincount(of, w).astype(np.float64)
    return np.bincount(of, w * v) / weight, np.bincount(of, w * b) / weight, weight


def _standard_error(influence: Floats) -> float:
    """Of a mean of n independent terms whose centred values are `influence` `[n]`."""
    n = influence.size
    # Squares of what is near 1: those of huge or tiny values no float holds. A power of two changes no digit.
    unit = math.frexp(float(np.abs(influence).max()))[1]
    scaled = np.ldexp(influence, -unit)
    return math.ldexp(math.sqrt(float(scaled @ scaled) / (n * (n - 1))), unit)


def _influence(values: Floats, weight: Floats) -> Floats:
    """Linearised contribution of each item to a weighted mean: n wᵢ(xᵢ - x̄) / Σw."""
    scaled = weight * (values.size / float(weight.sum()))
    centred: Floats = values - float(np.average(values, weights=weight))
    return scaled * centred


def _t_test(difference: Floats, weight: Floats) -> float:
    from scipy.special import stdtr

    t = float(np.average(difference, weights=weight)) / _standard_error(_influence(difference, weight))
    return 2 * float(stdtr(difference.size - 1, -abs(t)))


def _t_interval(v: Floats, b: Floats, w: Floats, metric: str, confidence: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    reach = float(stdtrit(v.size - 1, 0.5 + confidence / 2))
    means = float(np.average(v, weights=w)), float(np.average(b, weights=w))
    influences = _influence(v, w), _influence(b, w)
    if metric in PERPLEXITIES:
        return _perplexity_interval(*means, *influences, reach)
    delta, reach = means[0] - means[1], reach * _standard_error(influences[0] - influences[1])
    return delta - reach, delta + reach


def _perplexity_interval(mean_v: float, mean_b: float, of_v: Floats, of_b: Floats, reach: float) -> tuple[float, float]:
    """Differences of perplexities that a t test with `reach` standard errors does not reject, from mean NLLs and their influences `[n]`.

    With the lower perplexity as it was found, a difference says by how much, `shift`, the mean NLLs differ; the influence of the higher one
    is 1 then, that of the lower one exp(-|shift|). For 0 that is the test of the p value itself, so that an interval holds 0 where the
    p value says so, and only there: one of estimate ± reach holds it beside p = 0.01 where texts differ widely.
    """
    from scipy.optimize import brentq

    found = mean_v - mean_b

    def beyond(shift: float) -> float:
        lower = math.exp(-abs(shift))
        return abs(found - shift) - reach * _standard_error(of_v - lower * of_b if shift > 0 else lower * of_v - of_b)

    def difference(shift: float) -> float:
        return math.copysign(math.exp(mean_b if shift > 0 else mean_v) * float(np.expm1(abs(shift))), shift)

    # The standard error is greatest where the lower one's part is 0 or 1.
    farthest = (1 + 1e-9) * reach * max(map(_standard_error, (of_v, of_b, of_v - of_b)))
    ends = []
    for end in (found - farthest, found + farthest):
        inside, outside = found, end
        if min(found, end) < 0 < max(found, end):
            inside, outside = (found, 0.0) if beyond(0.0) > 0 else (0.0, end)
        ends.append(difference(brentq(beyond, inside, outside, xtol=1e-12)))
    return ends[0], ends[1]


def _bootstrap(
    v: Floats, b: Floats, w: Floats, score: Any, delta: float, confidence: float, seed: int, resamples: int
) -> tuple[str, float, float]:
    """BCa interval over rows, which are units; percentile where the bias correction or the acceleration is undefined."""
    from scipy.special import ndtr, ndtri

    terms = np.stack([w, w * v, w * b], axis=1)  # [n, 3]
    sums = np.concatenate([c.astype(np.float64) @ terms for c in np.array_split(_draws(v.size, seed, resamples), -(-resamples // _CHUNK))])
    drawn = score(sums[:, 1] / sums[:, 0]) - score(sums[:, 2] / sums[:, 0])
    tails = np.array([0.5 - confidence / 2, 0.5 + confidence / 2])

    left = terms.sum(0) - terms  # sums without one item, [n, 3]
    jackknife = score(left[:, 1] / left[:, 0]) - score(left[:, 2] / left[:, 0])
    off = jackknife.mean() - jackknife
    spread = float(off @ off)
    bias = ndtri(float(np.mean(drawn < delta) + np.mean(drawn == delta) / 2))
    method = "percentile"
    if np.isfinite(bias) and spread > 0 and np.all(np.isfinite(off)):
        z = bias + ndtri(tails)
        stretch = 1 - float((off**3).sum()) / (6 * spread**1.5) * z
        if np.all(stretch > 0):
            method, tails = "bca", ndtr(bias + z / stretch)
    low, high = np.quantile(drawn, tails)
    return method, float(low), float(high)


def _draws(n: int, seed: int, resamples: int) -> NDArray[np.uint8]:
    """How often each of n units is drawn in each resample, `[resamples, n]`. Shared by all variants of a task."""
    with _drawing:
        out = _drawn.pop((n, seed, resamples), None)
        out = _drawn[n, seed, resamples] = _draw(n, seed, resamples) if out is None else out
        while len(_drawn) > 1 and sum(a.nbytes for a in _drawn.values()) > KEPT_DRAWS:
            del _drawn[next(iter(_drawn))]  # the one whose last use is longest ago
    return out


def _draw(n: int, seed: int, resamples: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([seed, n])
    out = np.empty((resamples, n), dtype=np.uint8)
    for row in range(resamples):
        out[row] = np.bincount(rng.integers(0, n, size=n), minlength=n)
    return out
