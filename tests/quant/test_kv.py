"""KV-cache quantizers: golden values of the reference code, KIVI's rule against a slow one, and what must hold for all of them."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.errors import NonFiniteError, ScaleDtypeError
from quant.kernels.kmeans_columns import numpy_stream
from quant.kv import Kivi, KVQuant, KVQuantizer, PerToken, make
from quant.kv.kivi import round_groups
from quant.kv.kmeans import kmeans
from quant.kv.kvquant import online_range, quantiles, round_range
from quant.scheme import KVScheme


def rel(q: Tensor, x: Tensor) -> float:
    return float((q - x).norm() / x.norm())


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- golden values ------------------------------------------------------------------------------------------------


@cache
def golden_keys() -> Tensor:
    k = torch.from_numpy(np.random.RandomState(5).standard_normal((1, 2, 128, 64)).astype(np.float32))
    k[..., 7] *= 8
    return k


@cache
def golden_layer() -> Tensor:
    t = torch.from_numpy(np.random.RandomState(6).standard_normal((1, 1024, 64)).astype(np.float32))[0]
    t[:, 7] = 8 * t[:, 7] + 5
    return t


@pytest.mark.parametrize(("bits", "per_channel", "per_token"), [(2, 0.392380, 0.551729), (4, 0.078742, 0.100128)])
def test_kivi_equals_the_reference_code(bits: int, per_channel: float, per_token: float) -> None:
    k = golden_keys()
    assert rel(round_groups(k, bits, 32, -2), k) == pytest.approx(per_channel, rel=1e-4)
    assert rel(round_groups(k, bits, 32, -1), k) == pytest.approx(per_token, rel=1e-4)


def test_kvquants_codebook_equals_the_reference_code() -> None:
    made = KVQuant(3, 0.0, scale_dtype="float32").calibrate(golden_layer(), golden_layer())
    assert made.key_codebook is not None
    want = [-0.7262, -0.4693, -0.2816, -0.1167, 0.0420, 0.2090, 0.4007, 0.6674]
    assert made.key_codebook.tolist() == pytest.approx(want, abs=5e-5 + 1e-5)  # printed to four digits


@pytest.mark.parametrize(("outliers", "codebook", "want"), [(0.0, "uniform", 0.2366), (0.01, "uniform", 0.1869), (0.01, "nuq", 0.1491)])
def test_kvquants_error_per_channel_equals_the_reference_code(outliers: float, codebook: str, want: float) -> None:
    """The reference's rows take ranges from the channel at hand; its codebook is the calibrated one."""
    x = golden_layer()
    made = KVQuant(3, outliers, codebook, scale_dtype="float32").calibrate(x, x)
    channels = x.T.contiguous()
    low, high, kept = online_range(channels, outliers / 2)
    q = torch.where(kept, channels, round_range(channels, low, high, 3, made.key_codebook))
    assert rel(q, channels) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("outliers", "codebook", "want"), [(0.0, "uniform", 0.3084), (0.01, "uniform", 0.1093), (0.01, "nuq", 0.1084)])
def test_kvquants_error_per_token_equals_the_reference_code(outliers: float, codebook: str, want: float) -> None:
    x = golden_layer()
    made = KVQuant(3, outliers, codebook, scale_dtype="float32").calibrate(x, x)
    assert rel(made.values_rounded(x), x) == pytest.approx(want, abs=1e-4)


# --- k-means ------------------------------------------------------------------------------------------------------


def test_the_stream_is_numpys() -> None:
    for seed in (0, 1, 12345):
        stream = numpy_stream(seed)
        assert [stream.random() for _ in range(700)] == np.random.RandomState(seed).random_sample(700).tolist()


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_is_a_fixed_point_near_the_optimum(weighted: bool) -> None:
    v, w = tokens(0, 400).sort().values, tokens(1, 400).abs() if weighted else None
    centres = kmeans(v, 4, w, steps=1000)
    weight = torch.ones(400) if w is None else w
    nearest = (v[:, None].double() - centres).abs().argmin(1)
    for i in range(4):  # tolerance: Lloyd stops when centres moved less than 1 % of a standard deviation together
        own = nearest == i
        assert float((v * weight)[own].sum() / weight[own].sum()) == pytest.approx(float(centres[i]), abs=0.02)
    cost = float((weight * (v - centres[nearest].float()).square()).sum())
    # One start finds a local optimum; on these values it is 6 % above the global one.
    assert cost <= 1.1 * best_cost(v.double(), weight.double(), 4)


def best_cost(v: Tensor, w: Tensor, k: int) -> float:
    """Exact, by dynamic programming over sorted values."""
    zero = torch.zeros(1, dtype=torch.float64)
    m, s, q = (torch.cat([zero, x.cumsum(0)]) for x in (w, w * v, w * v * v))
    n = len(v)
    cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
    for i in range(n):
        mass, first, second = (x[i + 1 :] - x[i] for x in (m, s, q))
        cost[i, i + 1 :] = second - first.square() / mass
    best = cost[0].clone()
    for _ in range(1, k):
        best = (best[:, None] + cost).amin(0)
    return float(best[n])


def test_kmeans_with_few_values_gives_those() -> None:
    assert kmeans(torch.tensor([2.0, -1.0, 2.0, 2.0]), 8).tolist() == [-1.0, 2.0]
    with pytest.raises(ValueError, match="0 values"):
        kmeans(torch.zeros(0), 4)


def test_quantiles_are_torchs() -> None:
    x = tokens(0, 7, 63)
    for dim in (0, 1):
        for tail in (0.005, 0.1):
            low, high = quantiles(x, tail, dim)
            torch.testing.assert_close(low, x.quantile(tail, dim, keepdim=True))
            torch.testing.assert_close(high, x.quantile(1 - tail, dim, keepdim=True))


# --- the state machine ----------------------------------------------------------------------------------------------

H, D = 2, 8
splits = st.lists(st.integers(1, 11), min_size=1, max_size=8)


def slow_group(values: list[float], bits: int) -> list[float]:
    """One group by KIVI's formula in plain Python; scale and minimum as float16 holds them."""
    low, high = (float(np.float32(f(values))) for f in (min, max))
    scale = float(np.float16(np.float32((np.float32(high) - np.float32(low)) / np.float32(2**bits - 1))))
    minimum = float(np.float16(low))
    codes = [0.0 if scale == 0 else float(np.rint(min(max((v - minimum) / scale, 0), 2**bits - 1))) for v in values]
    return [c * scale + minimum for c in codes]


def slow_view(k: Tensor, v: Tensor, held: int, g: int, r: int, bits: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, H, n, D]` as a step sees them that found `held` tokens in the cache, from KIVI's text."""
    k, v = k.clone(), v.clone()
    for h in range(H):
        for block in range(held // r):  # every full residual was flushed as a whole
            for start in range(block * r, (block + 1) * r, g):
                for d in range(D):
                    k[0, h, start : start + g, d] = torch.tensor(slow_group(k[0, h, start : start + g, d].tolist(), bits))
        for t in range(max(0, held - r)):  # the oldest value left when there were R + 1
            for start in range(0, D, g):
                v[0, h, t, start : start + g] = torch.tensor(slow_group(v[0, h, t, start : start + g].tolist(), bits))
    return k, v


@settings(max_examples=10, deadline=None)
@given(splits, st.sampled_from([(4, 4), (4, 8), (2, 6), (8, 16)]), st.sampled_from([2, 4]))
def test_any_split_gives_the_boundaries_of_kivis_rule(steps: list[int], shape: tuple[int, int], bits: int) -> None:
    g, r = shape
    k, v = tokens(1, 1, H, sum(steps), D), tokens(2, 1, H, sum(steps), D)
    state = Kivi(bits, bits, g, r).new_state(1, H, D)
    held = 0
    for n in steps:
        state.append(k[:, :, held : held + n], v[:, :, held : held + n])
        want = slow_view(k[:, :, : held + n], v[:, :, : held + n], held, g, r, bits)
        for got, expected in zip(state.read(), want, strict=True):
            # The slow rule divides in float64: where a value lies between two codes to 1e-6, one may differ. None does on these.
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        held += n
        assert state.length == held


def calibrated(bits: int, **params: object) -> KVQuant:
    return KVQuant(bits, **params).calibrate(tokens(3, 200, H * D), tokens(4, 200, H * D))  # type: ignore[arg-type]


ALL: list[KVQuantizer] = [
    PerToken(3),
    PerToken(4, symmetric=True, group_size=4),
    PerToken(4, mixed=8),
    Kivi(2, 4, 4, 8),
    calibrated(3),
    calibrated(3, codebook="uniform", outliers=0.0),
    calibrated(2, first_few_fp16=3),
]


def read_after(rule: KVQuantizer, k: Tensor, v: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
    state = rule.new_state(k.shape[0], H, D, k.dtype)
    start = 0
    for n in steps:
        state.append(k[:, :, start : start + n], v[:, :, start : start + n])
        start += n
    keys, values = state.read()
    return keys.clone(), values.clone()


def data(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return tokens(5, batch, H, length, D), tokens(6, batch, H, length, D)


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.name)
@given(steps=splits)
@settings(max_examples=6, deadline=None)
def test_a_batch_equals_singles(rule: KVQuantizer, steps: list[int]) -> None:
    k, v = data(3, sum(steps))
    together = read_after(rule, k, v, steps)
    for i in range(3):
        for a, b in zip(together, read_after(rule, k[i : i + 1], v[i : i + 1], steps), strict=True):
            assert torch.equal(a[i : i + 1], b)


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.name)
@given(steps=splits)
@settings(max_examples=6, deadline=None)
def test_steps_of_the_allowed_length_read_as_single_tokens(rule: KVQuantizer, steps: list[int]) -> None:
    """What a chunk reads at each of its positions is what a single token there reads."""
    k, v = data(1, sum(steps))
    chunked, single = rule.new_state(1, H, D), rule.new_state(1, H, D)
    start = 0
    for wanted in steps:
        n = min(wanted, chunked.together() or wanted)
        chunked.append(k[:, :, start : start + n], v[:, :, start : start + n])
        for t in range(start, start + n):
            single.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
            for a, b in zip(chunked.read(), single.read(), strict=True):
                assert torch.equal(a[:, :, : t + 1], b)
        start += n


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.name)
def test_reorder_is_the_cache_of_the_chosen_sequences(rule: KVQuantizer) -> None:
    k, v = data(3, 30)
    index = torch.tensor([2, 2, 0, 1])
    state = rule.new_state(3, H, D)
    state.append(k[:, :, :21], v[:, :, :21])
    state.reorder(index)
    state.append(k[index, :, 21:], v[index, :, 21:])
    for a, b in zip(state.read(), read_after(rule, k[index], v[index], [21, 9]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", [PerToken(16), Kivi(16, 16, 4, 8), calibrated(16), Kivi(2, 2, 4, 64), KVQuant(2, first_few_fp16=60)])
def test_16_bits_or_a_window_longer_than_the_text_is_full_precision(rule: KVQuantizer) -> None:
    k, v = data(2, 50)
    for steps in ([50], [1] * 50, [7, 30, 13]):
        keys, values = read_after(rule, k, v, steps)
        assert torch.equal(keys, k)
        assert torch.equal(values, v)
    assert rule.bits(50, H, D) == 16


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_constant_groups(rule: KVQuantizer, dtype: torch.dtype) -> None:
    k, v = (x.to(dtype) for x in data(1, 24))
    k[:, :, :, 2], v[:, :, 3] = 0.75, -1.5
    before = k.clone()
    keys, values = read_after(rule, k, v, [20, 4])
    assert keys.dtype is values.dtype is dtype
    assert torch.isfinite(keys).all()
    assert torch.isfinite(values).all()
    assert torch.equal(k, before)
    if isinstance(rule, Kivi):
        assert torch.equal(keys[..., 2], k[..., 2])
        assert torch.equal(values[:, :, 3], v[:, :, 3])


def test_wrong_shapes_and_parameters_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"this cache takes \[1, 2, T, 8\] of both"):
        PerToken(4).new_state(1, H, D).append(torch.zeros(1, H, 3, D), torch.zeros(1, H, 4, D))
    with pytest.raises(ValueError, match="a multiple of the group size"):
        Kivi(2, 2, 32, 48)
    with pytest.raises(ValueError, match="allowed: 2, 3, 4, 5, or 16"):
        KVQuant(8)
    with pytest.raises(ValueError, match="calibrate with keys and values first"):
        read_after(KVQuant(3), *data(1, 4), [4])
    with pytest.raises(ScaleDtypeError, match=r"do not fit torch\.float16; a cache of kv\.kind=per_token has float32 ranges"):
        round_groups(torch.full((1, 32), 1e6) * torch.arange(32), 2, 32, -1, torch.float16)
    with pytest.raises(ValueError, match="version 1 here; version 2"):
        make(KVScheme(4, version=2))
    assert Kivi(2, 2, 32, 32).refuses(48) == "kv.group_size=32 does not divide a head of 48 channels"
    assert PerToken(4, group_size=5).refuses(64) is not None


@pytest.mark.parametrize("rule", [Kivi(2, 2, 4, 4), KVQuant(3, 0.1, "uniform").calibrate(tokens(1, 50, H * D), tokens(2, 50, H * D))])
def test_values_that_are_not_finite_are_called_so(rule: KVQuantizer) -> None:
    """They fit no type of a range: it is the model that overflowed."""
    keys, values = data(1, 9)
    values[0, 1, 2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite values"):
        read_after(rule, keys, values, [8, 1])


# --- what the methods are for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_per_channel_keys_beat_per_token_where_channels_are_planted(bits: int) -> None:
    k, v = tokens(7, 2, H, 256, 32), tokens(8, 2, H, 256, 32)
    k[..., [3, 20]] += 16  # large in every token, as such channels are
    query = tokens(9, 2, H, 64, 32)
    error = []
    for rule in (Kivi(bits, bits, 32, 32), PerToken(bits, group_size=32)):
        state = rule.new_state(2, H, 32)
        state.append(k, v)
        state.append(k[:, :, :1], v[:, :, :1])  # KIVI ages after the step
        keys = state.read()[0][:, :, :256]
        error.append(float((query @ (keys - k).transpose(2, 3)).norm()))
    assert error[0] < 0.5 * error[1]


def test_outliers_kept_exactly_help_and_are_exact() -> None:
    k, v = tokens(10, 500, 32), tokens(11, 500, 32)
    v[::3, 5] += 30
    dense, sparse = (KVQuant(3, share).calibrate(k, v) for share in (0.0, 0.05))
    assert rel(sparse.values_rounded(v), v) < 0.5 * rel(dense.values_rounded(v), v)
    exact = sparse.values_rounded(v) == v
    assert exact[::3, 5].all()
    low, high = k.quantile(0.025, 0), k.quantile(0.975, 0)
    outside = (k < low - 0.01) | (k > high + 0.01)  # ranges are stored in float16
    assert (sparse.keys_rounded(k) == k)[outside].all()


def test_rounded_values_have_as_many_levels_as_the_bits_allow() -> None:
    rule = calibrated(2)
    q = rule.keys_rounded(tokens(12, 300, H * D))
    low, high = rule.key_range or (None, None)
    for channel in range(H * D):
        column = q[:, channel]
        inside = column[(column >= low[channel]) & (column <= high[channel])]
        assert len(inside.unique()) <= 4


# --- bits -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.sampled_from([2, 4]), st.sampled_from([32, 64, 128]))
def test_kivis_bits_count_the_residual(length: int, bits: int, r: int) -> None:
    """methods.md: ((L - res)(b + 32 / G) + 16 res) / L, with the residual of keys L mod R and of values min(L, R)."""
    whole = []
    for residual in (length % r, min(length, r)):
        whole.append(((length - residual) * (bits + 1) + 16 * residual) / length)
    assert Kivi(bits, bits, 32, r).bits(length, 8, 128) == pytest.approx(sum(whole) / 2)


@pytest.mark.parametrize("outliers", [0.01, 0.1])
@pytest.mark.parametrize("width", [32, 128])
def test_kvquants_bits_count_every_value_that_is_kept(width: int, outliers: float) -> None:
    """Of tokens without equal values: 16 bits and an index of 16 for each. Keys keep the share. A channel or token has a range of 32."""
    length = 40
    _, _, mask = online_range(tokens(13, length, width), outliers / 2)
    assert float(mask.float().mean()) > outliers
    kept = (outliers + float(mask.double().mean())) / 2
    ranges = (32 / length + 32 / width) / 2
    assert KVQuant(3, outliers, "uniform").bits(length, 2, width // 2) == pytest.approx(3 + 32 * kept + ranges)


def test_bits_of_long_caches_are_the_published_ones() -> None:
    assert Kivi(2, 2, 32, 32).bits(10**7, 32, 128) == pytest.approx(3.0, abs=1e-3)
    for bits, low, high in ((4, 4.32, 4.33), (3, 3.32, 3.35), (2, 2.32, 2.33)):
        assert low - 0.005 <= calibrated(bits).bits(32768, 32, 128) <= high + 0.005
    assert PerToken(4).bits(9, 2, 64) == 4 + 48 / 64
    assert PerToken(4, symmetric=True, group_size=32).bits(9, 2, 64) == 4 + 32 / 32
    sizes = [calibrated(3, first_few_fp16=5).bits(n, 2, 64) for n in (5, 50, 500)]
    assert all(a > b for a, b in itertools.pairwise(sizes))
