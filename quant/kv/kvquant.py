"""KVQuant (arXiv 2401.18079): keys per channel before the rotary embedding, values per token, few outliers kept exactly.

Objective: none online; a codebook by k-means on calibration data (weighted by Fisher information where given), one per layer for
keys and one for values. x is centred and divided by half its range, so that it lies in [-1, 1], and rounded to the nearest code.

Keys: range per channel, fixed by calibration: the (1 ± (1 - outliers)) / 2 quantiles, or min and max without outliers; what lies
outside is an outlier. Values: range per token over all heads together, online: values at or beyond the same quantiles of their token
are outliers, and the range is min and max of the rest (the token's median stands in for its outliers). Outliers and the
`first_few_fp16` first tokens are kept in the model's own type, counted as 16 bits (and 16 for an outlier's index). Calibration is on
what is not kept: who calls `calibrate` leaves the first tokens of its sequences out (the reference leaves them in its ranges).

Every token is quantized before attention reads it, so that one pass over a text and decoding it token by token read the same.
Codebooks: `nuq` from k-means (2^b centres, at most 50 steps), or `uniform`: code = round((x - low) / s) with s = (high - low) /
(2^b - 1), offset not rounded (`quant_fn_zp`). An empty range decodes to its middle (the reference makes its NaN 0).
Departures: ranges are stored in `scale_dtype`; calibration reads 16 sequences, 8,192 tokens at most. NormalFloat, Q-Norm and the cap of
21 outliers a token are not here.
Bits: b + 32 per kept value + ranges (32 a channel of a layer, 32 a token) + codebooks. Kept are the share `outliers` of keys and, of the
W values of a token, 2 (⌊outliers / 2 · (W - 1)⌋ + 1): those at the quantiles too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quant.grids import DTYPES
from quant.kv.base import FULL, KVState, check_bits, stored
from quant.kv.kmeans import kmeans
from quant.scheme import KV_CODEBOOKS


def quantiles(x: Tensor, tail: float, dim: int) -> tuple[Tensor, Tensor]:
    """The `tail` and `1 - tail` quantiles along `dim`, kept as 1, interpolated linearly; min and max for tail 0. Any size."""
    if tail == 0:
        return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    ordered = x.sort(dim).values

    def at(q: float) -> Tensor:
        place = q * (x.shape[dim] - 1)
        low = int(place)
        a, b = (ordered.narrow(dim, min(i, x.shape[dim] - 1), 1) for i in (low, low + 1))
        return torch.lerp(a, b, place - low)

    return at(tail), at(1 - tail)


def online_range(x: Tensor, tail: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row `[..., W]`: (low, high) `[..., 1]` of what is no outlier, and the mask of outliers."""
    low, high = quantiles(x, tail, -1)
    if tail == 0:
        return low, high, torch.zeros_like(x, dtype=torch.bool)
    outliers = (x <= low) | (x >= high)
    rest = torch.where(outliers, x.median(-1, keepdim=True).values, x)
    return rest.amin(-1, keepdim=True), rest.amax(-1, keepdim=True), outliers


def normalised(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[low, high] ▸ [-1, 1]; an empty range ▸ 0."""
    half = (high - low) / 2
    return torch.where(half > 0, (x - (low + high) / 2) / torch.where(half > 0, half, 1.0), 0.0)


def round_range(x: Tensor, low: Tensor, high: Tensor, bits: int, codebook: Tensor | None) -> Tensor:
    """Nearest code, in x's shape: of the ascending `codebook` in [-1, 1], or of 2^bits even steps from low to high."""
    if codebook is None:
        top = 2**bits - 1
        codes = ((normalised(x, low, high) + 1) * (top / 2)).round().clamp(0, top)
        return torch.where(high > low, codes * ((high - low) / top) + low, (low + high) / 2)
    book = codebook.to(x)
    nearest = book[torch.bucketize(normalised(x, low, high).contiguous(), (book[1:] + book[:-1]) / 2)]
    return torch.where(high > low, nearest * ((high - low) / 2) + (low + high) / 2, (low + high) / 2)


@dataclass(frozen=True, eq=False)
class KVQuant:
    name: ClassVar[str] = "kvquant"
    version: ClassVar[int] = 2
    pre_rope: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"kv"})

    bits_per_value: int = 3
    """2 to 5; 16 stores what comes."""
    outliers: float = 0.01
    """Share of values kept exactly; 0 for dense only."""
    codebook: str = "nuq"
    """nuq: k-means on calibration data; uniform: even steps."""
    first_few_fp16: int = 0
    """Tokens at the start that are kept exactly (attention sinks)."""
    scale_dtype: str = "float16"
    key_range: tuple[Tensor, Tensor] | None = None
    """Calibrated: low and high `[H D]` of each key channel."""
    key_codebook: Tensor | None = None
    value_codebook: Tensor | None = None

    def __post_init__(self) -> None:
        check_bits(self.name, self.bits_per_value, (2, 3, 4, 5))
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"outliers={self.outliers} of kvquant; give a share from 0 to below 0.5, such as 0.01")
        if self.codebook not in KV_CODEBOOKS:
            raise ValueError(f"codebook={self.codebook} of kvquant; choose {' or '.join(KV_CODEBOOKS)}")
        if self.first_few_fp16 < 0:
            raise ValueError(f"first_few_fp16={self.first_few_fp16} of kvquant must not be negative")
        if self.scale_dtype not in DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype}; choose {' or '.join(DTYPES)}")

    @property
    def tail(self) -> float:
        return self.outliers / 2

    def kept_values(self, width: int) -> int:
        """Of the `width` values of a token, where no two are equal: outliers by `online_range`."""
        return min(width, 2 * (int(self.tail * (width - 1)) + 1)) if self.outliers else 0

    def refuses(self, head_dim: int) -> str | None:
        return None

    def calibrate(self, keys: Tensor, values: Tensor, key_weights: Tensor | None = None, value_weights: Tensor | None = None) -> KVQuant:
        """Keys before the rotary embedding. Raises ValueError without tokens, and as `stored`."""
        if not keys.numel() or not values.numel():
            raise ValueError("kvquant got no calibration tokens; it needs keys and values of some")
        keys, values = keys.float(), values.float()
        key_low, key_high = (self._stored(x, "keys") for x in quantiles(keys, self.tail, 0))
        value_low, value_high = quantiles(values, self.tail, -1)
        return replace(
            self,
            key_range=(key_low[0], key_high[0]),
            key_codebook=self._fit(normalised(keys, key_low, key_high), key_weights),
            value_codebook=self._fit(normalised(values, value_low, value_high), value_weights),
        )

    def _fit(self, x: Tensor, weights: Tensor | None) -> Tensor | None:
        if self.codebook != "nuq" or self.bits_per_value == FULL:
            return None
        inside = x.abs() <= 1 if self.outliers else torch.ones_like(x, dtype=torch.bool)
        return kmeans(x[inside], 2**self.bits_per_value, None if weights is None else weights[inside])

    def _stored(self, x: Tensor, what: str) -> Tensor:
        return stored(x, DTYPES[self.scale_dtype], what)

    def keys_rounded(self, keys: Tensor) -> Tensor:
        """`[..., H D]` on the calibrated ranges."""
        if self.bits_per_value == FULL:
            return keys
        if self.key_range is None:
            raise ValueError("kvquant is not calibrated; call calibrate with keys and values first")
        x = keys.float()
        low, high = (r.to(x.device) for r in self.key_range)
        q = round_range(x, low, high, self.bits_per_value, self.key_codebook)
        if self.outliers:
            q = torch.where((x < low) | (x > high), x, q)
        return q.to(keys.dtype)

    def values_rounded(self, values: Tensor) -> Tensor:
        """`[..., H D]`, each token on its own range."""
        if self.bits_per_value == FULL:
            return values
        x = values.float()
        low, high, outliers = online_range(x, self.tail)
        low, high = self._stored(low, "values"), self._stored(high, "values")
        q = round_range(x, low, high, self.bits_per_value, self.value_codebook)
        return torch.where(outliers, x, q).to(values.dtype)

    def new_state(
        self, batch: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> KVState:
        return _State(self, batch, heads, head_dim, dtype, device)

    def bits(self, length: int, heads: int, head_dim: int) -> float:
        if self.bits_per_value == FULL or not length:
            return float(FULL)
        width, scale = heads * head_dim, 8 * DTYPES[self.scale_dtype].itemsize
        sinks = min(self.first_few_fp16, length)
        coded = length - sinks
        kept = (self.outliers + self.kept_values(width) / width) / 2
        codes = coded * (self.bits_per_value + (FULL + 16) * kept)
        books = 2 * 2**self.bits_per_value * 32 / width if self.codebook == "nuq" else 0.0
        # Per channel of values: a range of keys once, a range of values a token shared by the width, two codebooks once.
        shared = (2 * scale + coded * 2 * scale / width + books) / 2 if coded else 0.0
        return (codes + sinks * FULL + shared) / length


class _State(KVState):
    _rule: KVQuant

    def _written(self, start: int) -> None:
        start = max(start, self._rule.first_few_fp16)
        if start >= self.length or self._rule.bits_per_value == FULL:
            return
        for held, rounded in ((self._keys, self._rule.keys_rounded), (self._values, self._rule.values_rounded)):
            new = held[:, :, start : self.length]
            flat = new.transpose(1, 2).flatten(2)  # [B, T, H D]
            held[:, :, start : self.length] = rounded(flat).view(*new.transpose(1, 2).shape).transpose(1, 2)
