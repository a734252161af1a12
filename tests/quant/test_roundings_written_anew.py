"""Whole runs of roundings with error feedback against the papers' rules written anew in numpy, without a factorization of the Hessian.

Both compute in float64 with scales rounded to float32. What is stored decodes in float32: a value is off by 2^-24 of the largest terms
that it is made of, and a code that fell to the other side would be a step off, thousands of times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quant.butterfly import butterflies
from quant.kernels import kernel
from quant.methods.base import Linear, Rounded
from quant.methods.claq import Claq
from quant.methods.gptq import Gptq
from quant.methods.quip import Quip
from quant.methods.slim_llm import SlimLlm
from quant.methods.spqr import Spqr
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors.incoherent import IncoherentTensor

Array = NDArray[np.float64]
RoundColumn = Callable[[int, Array], Array]
"""(position j, weights `[N, K]` in the order of work with all earlier errors fed back) ▸ values `[N]` of column j."""


def problem(n: int, k: int, seed: int) -> tuple[Array, Array, Array]:
    """Weight `[N, K]`, inputs `[S, T, K]` of correlated channels and unequal size, and their Hessian."""
    draw = np.random.RandomState(seed)
    x = draw.standard_normal((3, 60, k)) @ (np.eye(k) + 0.3 * draw.standard_normal((k, k))) * np.linspace(0.3, 2, k)
    tokens = x.reshape(-1, k)
    return draw.standard_t(4, (n, k)), x, 2 / 3 * tokens.T @ tokens


def single(x: Any) -> Any:
    """Rounded to float32, as scales are stored."""
    return np.float64(np.float32(x)) if np.isscalar(x) else np.asarray(x).astype(np.float32).astype(np.float64)


def damped(h: Array, share: float) -> Array:
    return h + share * np.diag(h).mean() * np.eye(len(h))


def by_elimination(w: Array, h: Array, order: Array, round_column: RoundColumn) -> Array:
    """Optimal brain quantization in a given order (Frantar & Alistarh 2022, eq. 2 and 4): H⁻¹ loses a row and a column at every step."""
    w, inverse = w[:, order].copy(), np.linalg.inv(h[np.ix_(order, order)])
    values = np.zeros_like(w)
    for j in range(w.shape[1]):
        values[:, j] = round_column(j, w)
        w -= np.outer((w[:, j] - values[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    out = np.zeros_like(values)
    out[:, order] = values
    return out


def remaining(h: Array) -> Array:
    """[(H_{j:,j:})⁻¹]_jj `[K]`."""
    return np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(len(h))])


def decreasing(h: Array, act_order: bool) -> Array:
    return np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))


def on_grid(v: Array, scale: Any, zero: Any, bits: int) -> Array:
    values: Array = (np.clip(np.round(v / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return values


def hold(result: Rounded, want: Array) -> None:
    got = result.tensor.dequantize().double().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-22 * np.abs(want).max())


def given(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def scheme(bits: int, size: int | None, symmetric: bool = False) -> WeightScheme:
    return WeightScheme(bits, symmetric, Granularity.CHANNEL if size is None else Granularity.GROUP, size, "float32")


# --- GPTQ -----------------------------------------------------------------------------------------------------------


def g_asym(row: Array, bits: int, share: float = 1.0) -> tuple[float, float]:
    low, high = share * min(row.min(), 0), share * max(row.max(), 0)
    scale = single((high - low) / (2**bits - 1))
    return scale, np.round(-low / scale)


def fitted(row: Array, bits: int, mse: bool) -> tuple[float, float]:
    """The whole range, or the first of 80 shrunken ones with the least Σ |error|^2.4."""
    trials = [g_asym(row, bits, 1 - i / 100) for i in range(80 if mse else 1)]
    return min(trials, key=lambda t: (np.abs(on_grid(row, *t, bits) - row) ** 2.4).sum())


@pytest.mark.parametrize(
    ("bits", "size", "act_order", "static", "block", "mse", "dead"),
    [
        (3, 8, True, True, 16, False, False),
        (3, 8, True, False, 16, False, True),
        (2, 8, False, False, 5, True, True),
        (2, 16, False, True, 8, True, True),
        (4, None, True, False, 128, True, True),
    ],
)
def test_gptq(bits: int, size: int | None, act_order: bool, static: bool, block: int, mse: bool, dead: bool) -> None:
    w, _, h = problem(11, 48, 1)
    if dead:
        h[5], h[:, 5] = 0, 0
    result = Gptq(act_order=act_order, static_groups=static, block_size=block, mse=mse).quantize(
        given(w), Statistics(hessian=given(h)), scheme(bits, size)
    )
    zeroed, full = w.copy(), h.copy()
    if dead:
        zeroed[:, 5], full[5, 5] = 0, 1
    order, width = decreasing(full, act_order), size or 48
    source = zeroed if size else w  # ranges of rows are from before inputs were found dead
    known = [[fitted(row[a : a + width], bits, mse) for a in range(0, 48, width)] for row in source]
    seen: dict[str, Any] = {}

    def round_column(j: int, now: Array) -> Array:
        if size is None or static:
            pairs = [of[order[j] // width] for of in known]
        else:
            if j % block == 0:
                seen["block"] = now.copy()  # dynamic ranges do not see errors of their own block
            if j % size == 0:
                seen["pairs"] = [fitted(row[j : j + size], bits, mse) for row in seen["block"]]
            pairs = seen["pairs"]
        scale, zero = np.array(pairs).T
        return on_grid(now[:, j], scale, zero, bits)

    hold(result, by_elimination(zeroed, damped(full, 0.01), order, round_column))


# --- SpQR -----------------------------------------------------------------------------------------------------------


def two_level(values: Array, bits: int) -> Array:
    """Codes with a range for every 16 rows."""
    out = values.copy()
    for part in (slice(a, a + 16) for a in range(0, len(values), 16)):
        low, high = values[part].min(), values[part].max()
        if high > low:
            scale = single((high - low) / (2**bits - 1))
            zero = single(-low / scale)
            out[part] = (np.clip(np.round(values[part] / scale + zero), 0, 2**bits - 1) - zero) * scale
    return out


@pytest.mark.parametrize(
    ("n", "k", "size", "bits", "act_order", "round_zero", "threshold"),
    [
        (20, 32, 8, 3, True, False, 0.2),
        (17, 32, 16, 3, False, False, 0.2),
        (16, 24, 8, 2, True, True, 0.1),
        (33, 16, 4, 4, True, False, 0.05),
    ],
)
def test_spqr(n: int, k: int, size: int, bits: int, act_order: bool, round_zero: bool, threshold: float) -> None:
    """Outliers left out of a range one at a time, statistics on grids of their own, weights whose error is too large kept."""
    w, _, h = problem(n, k, size)
    result = Spqr(act_order=act_order, round_zero=round_zero, outlier_threshold=threshold).quantize(
        given(w), Statistics(hessian=given(h)), scheme(bits, size)
    )
    full, top = damped(h, 1.0), 2**bits - 1
    order = decreasing(full, act_order)
    u2 = remaining(full[np.ix_(order, order)])
    tau = threshold * (w[:, order].var(0, ddof=1) / u2).mean()
    state: dict[str, Array] = {}

    def fit(row: Array) -> tuple[float, float]:
        low, high = (min(row.min(), 0), max(row.max(), 0)) if round_zero else (row.min(), row.max())
        scale = (high - low) / top
        return scale, np.round(-low / scale) if round_zero else -low / scale

    def near(v: Array, scale: Any, zero: Any) -> Array:
        values: Array = (np.clip(np.round(v / scale + zero), 0, top) - zero) * scale
        return values

    def error(row: Array, u2: Array) -> float:
        return float(((near(row, *fit(row)) - row) ** 2 / u2).sum())

    def round_column(j: int, now: Array) -> Array:
        if j % size == 0:
            pairs = []
            for row in now[:, j : j + size]:
                own = u2[j : j + size]
                others = [np.delete(np.arange(size), i) for i in range(size)]
                suspect = np.array([error(row, own) - error(row[rest], own[rest]) > tau for rest in others])
                pairs.append(fit(np.where(suspect, row[~suspect].mean() if (~suspect).any() else 0.0, row)))
            scale, zero = np.array(pairs).T
            state["scale"], state["zero"] = two_level(scale, 3), zero if round_zero else two_level(zero, 3)
        column = now[:, j]
        q = near(column, state["scale"], state["zero"])
        return np.where((column - q) ** 2 / u2[j] > tau, single(column), q)

    assert result.details["outlier_share"] > 0
    hold(result, by_elimination(w, full, order, round_column))


# --- SliM-LLM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "bits", "variant", "lam", "sigma"),
    [(48, 2, "reference", 1.0, 2.0), (48, 2, "corrected", 1.0, 2.0), (64, 3, "reference", 2.0, 2.0), (64, 2, "corrected", 3.0, 3.0)],
)
def test_slim_llm(k: int, bits: int, variant: str, lam: float, sigma: float) -> None:
    """Widths by divergence of the outputs, then ranges of the compensated weights, salient ones counted `lam` times."""
    n, size, corrected = 12, 8, variant == "corrected"
    w, x, h = problem(n, k, int(lam))
    w *= 0.3
    result = SlimLlm(variant=variant, lam=lam, sigma=sigma).quantize(
        given(w), Statistics(hessian=given(h), samples=given(x)), scheme(bits, size)
    )
    groups = [slice(a, a + size) for a in range(0, k, size)]
    raised = h + 0.01 * np.eye(k)
    full = damped(h if corrected else raised, 0.01)
    u2, tokens = remaining(full), x.reshape(-1, k)

    def widths(u2: Array, p: int) -> Array:
        order = np.argsort([(w[:, g] ** 2 / u2[g]).sum() for g in groups], kind="stable")
        found = np.full(len(groups), bits)
        found[order[:p]] -= 1
        found[order[len(groups) - p :]] += 1
        return found

    def one_bit(w: Array) -> tuple[Array, Array]:
        mean = w.mean(1)
        return mean, np.abs(w - mean[:, None] if corrected else w).mean(1)

    def plain(w: Array, bits: int) -> Array:
        if bits == 1:
            mean, scale = one_bit(w)
            return mean[:, None] + np.where(w >= mean[:, None], scale[:, None], -scale[:, None])
        return np.stack([on_grid(row, *g_asym(row, bits), bits) for row in w])

    def softmax(y: Array) -> Array:
        e = np.exp(y - y.max(1, keepdims=True))
        return np.maximum(e / e.sum(1, keepdims=True), 1e-6)

    def divergence(p: int) -> float:
        rounded = np.concatenate([plain(w[:, g], b) for g, b in zip(groups, widths(remaining(raised), p), strict=True)], 1)
        a, b = softmax(tokens @ rounded.T), softmax(tokens @ w.T)
        return float((a * np.log(a / b)).sum(1).mean())

    half = len(groups) // 2
    chosen = widths(u2, min(range(half + 1) if corrected else range(1, half), key=divergence))
    assert list(chosen) == result.details["group_bits"]
    first_wide = int(np.argmax(chosen >= bits))
    state: dict[str, Array] = {}

    def search(row: Array, importance: Array, bits: int, middle: bool) -> tuple[float, float]:
        def trial(share: float) -> tuple[float, float]:
            scale, zero = g_asym(row, bits, share)
            return scale, 2.0 ** (bits - 1) if middle else zero

        trials = [trial(p) for p in (*(1 + i / 500 for i in range(51)), *(1 - i / 500 for i in range(1, 51)))]
        return min(trials, key=lambda t: (importance * np.abs(on_grid(row, *t, bits) - row) ** 2.4).sum())

    def round_column(j: int, now: Array) -> Array:
        group = j // size
        bits = chosen[group]
        if j % size == 0:
            own = now[:, groups[group]]
            if bits == 1:
                state["mean"], state["scale"] = map(single, one_bit(own))
            else:
                salience = own**2 / u2[groups[group]]
                extreme = salience[np.abs(salience - salience.mean()) > sigma * salience.std(ddof=1)]
                importance = np.where(salience >= extreme.min(), lam, 1.0) if extreme.size else np.ones_like(own)
                middle = not corrected and group < first_wide
                pairs = [search(row, i, bits, middle) for row, i in zip(own, importance, strict=True)]
                state["scale"], state["zero"] = np.array(pairs).T
        column = now[:, j]
        if bits == 1:
            return np.where(column >= state["mean"], state["mean"] + state["scale"], state["mean"] - state["scale"])
        return on_grid(column, state["scale"], state["zero"], bits)

    hold(result, by_elimination(w, full, np.arange(k), round_column))


# --- CLAQ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "score", "variant", "act_order"), [(2.5, "magnitude", "reference", True), (3.3, "hessian", "corrected", False)]
)
def test_claq(target: float, score: str, variant: str, act_order: bool) -> None:
    """Adaptive precision and reserved tails; k-means of one column is itself held to plain loops in test_kmeans.py."""
    n, k, block = 200, 24, 8
    w, _, h = problem(n, k, 3)
    w[:, 3], w[:, 7] = 5 * w[:, 3], 9 * w[:, 7]
    base = 2 if target < 3 else 3
    result = Claq(
        adaptive_bits=target, outlier_reservation=True, score=score, variant=variant, act_order=act_order, block_size=block
    ).quantize(given(w), Statistics(hessian=given(h)), scheme(base, None))
    full = damped(h, 0.01)
    order = decreasing(h, act_order)
    ordered = w[:, order]
    large = (np.abs(ordered) >= 13 * np.abs(ordered).mean()).sum(0)
    scores = large if score == "magnitude" else (ordered**2).mean(0) / remaining(full[np.ix_(order, order)])
    ranks = np.argsort(-scores, kind="stable")
    widths = np.full(k, base)
    widths[ranks[: round((target - 2) / 2 * k if base == 2 else (target - 3) * k)]] = 4
    fractions = np.full(k, 0.004)
    fractions[(ranks if variant == "corrected" else np.argsort(-large, kind="stable"))[: round(0.1 * k)]] = 0.014
    fit = kernel("kmeans_columns", device=torch.device("cpu")).run.kmeans

    def round_column(j: int, now: Array) -> Array:
        column = now[:, j]
        centres = single(fit(given(column[None]), 2 ** int(widths[j]), "plus_plus")[0].sort().values.numpy())
        q = centres[np.abs(column[:, None] - centres).argmin(1)]
        share, down = fractions[j if variant == "corrected" else j % block], np.sort(column)[::-1]
        kept = (column >= down[round(n * share)]) | (column <= down[round(n * (1 - share))])
        return np.where(kept, single(column), q)

    hold(result, by_elimination(w, full, order, round_column))


# --- QuIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "rescale", "ascending"), [(2, True, False), (4, False, False), (3, True, True)])
def test_quip(bits: int, rescale: bool, ascending: bool) -> None:
    """Rescaling, incoherence, the grid of ±2.4 RMS, and LDLQ by elimination, last column first."""
    n, k, top = 15, 36, 2**bits - 1
    w, _, h = problem(n, k, bits)
    result = Quip(rescale=rescale, sort=ascending).quantize(
        given(w), Statistics(hessian=given(h)), WeightScheme(bits, True, Granularity.TENSOR, None, "float32"), Linear(seed=bits)
    )
    assert isinstance(result.tensor, IncoherentTensor)
    u, v = (
        b.apply(torch.eye(d, dtype=torch.float64)).T.numpy()
        for b, d in zip(butterflies(n, k, int(result.tensor.seed)), (n, k), strict=True)
    )
    s = single((np.diag(h / np.abs(h).max()) / (w**2).sum(0)) ** 0.25) if rescale else np.ones(k)
    scaled = h / s / s[:, None]
    mixed, rotated = u @ (w * s) @ v.T, v @ (scaled * k / np.trace(scaled) + 0.01 * np.eye(k)) @ v.T
    order = np.argsort(np.diag(rotated), kind="stable") if ascending else np.arange(k)
    left = damped(rotated[np.ix_(order, order)], 0.01)
    lower = np.eye(k)
    for j in range(k):  # H = L D Lᵀ
        lower[j:, j] = left[j:, j] / left[j, j]
        left = left - np.outer(lower[:, j], lower[:, j]) * left[j, j] * (np.arange(k) >= j)
    scale = single(2.4 * np.sqrt((mixed**2).mean()))
    steps = np.clip((mixed[:, order] / scale + 1) / 2 * top, 0, top)
    codes = np.zeros_like(steps)
    for j in reversed(range(k)):
        codes[:, j] = np.clip(np.round(steps[:, j] + (steps[:, j + 1 :] - codes[:, j + 1 :]) @ lower[j + 1 :, j]), 0, top)
    values = np.zeros_like(codes)
    values[:, order] = (2 * codes / top - 1) * scale
    hold(result, u.T @ values @ v / s)
