"""`kv_attention`: attention of one new token per sequence to a quantized cache, without making keys and values: out `[S, H, D]`.

Letters: S sequences, H query heads, KV heads of keys and values (H a multiple), D channels of a head, n tokens held. The cache is KIVI's
(`quant.kv.kivi`, G and R there): groups of keys run over G tokens of a channel, groups of values over G channels of a token, a value is
code · step + low, step and low float16; the latest tokens wait in full precision. Values decode to what `quant.kv` reads before that rounds
it to the model's type. `PerTokenPacked` (`per_token`) has the ranges of keys per token too, and no such tokens; what writes it is there.
`Plain` is a cache that is not quantized.

Every backend has `prepare`, `append`, `append_one` (of which a graph can be captured), `ages` (where it can not) and
`kv_attention(q, packed, scale=None, out=None) ▸ out`: q `[S, H, D]` float16, bfloat16 or float32; out in its type; scores are multiplied by
scale, D^-½ where None. What is held in the cache of a sequence stands on the device, in `counts`: a call waits for nothing, and a captured
graph of it reads what has been appended since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind

if TYPE_CHECKING:
    from quant.kernels.kv_attention.per_token import PerTokenPacked

Cache: TypeAlias = "Packed | Plain | PerTokenPacked"
Write: TypeAlias = "Callable[[Packed, Tensor, Tensor], None]"
"""A prompt into its cache, which has its `length` and `coded` already."""
WIDTHS, GROUPS = (16, 32, 64, 128, 256), (16, 32, 64, 128)
"""Channels of a head and sizes of a group that the layout takes."""
FEWEST_WORDS = 16
"""Of a token: what a product on tensor cores has in a row."""


@dataclass
class Packed:
    """`B` blocks of G tokens are room for n. Codes lie in words of 16 bits, in fields of 2, 4 or 8, the least that
    hold one: with W words to a token (at least 16, then in part empty), word w has the channels w, w + W, w + 2 W, ..., lowest first.
    """

    keys: Tensor
    """int16 `[S, KV, B, G, W]`."""
    key_ranges: Tensor
    """float16 `[S, KV, B, D, 2]`: step and low of a block's channels."""
    values: Tensor
    """int16 `[S, KV, B, W, G]`: a block's tokens are neighbours."""
    value_ranges: Tensor
    """float16 `[S, KV, B, D / G, G, 2]`: step and low of a token's groups of channels, tokens next to last."""
    window_keys: Tensor
    """`[S, KV, V, D]` in the model's type, V = R + G: token t in place t % V."""
    window_values: Tensor
    counts: Tensor
    """int32 `[S, 3]`: tokens whose keys are codes, the first ones, a multiple of G; the same of values; n."""
    key_bits: int
    value_bits: int
    residual: int = 0
    """R, for `append` alone."""
    length: int = 0
    """n as the host knows it, for `append` and `bytes` alone, of all sequences: these are of one length here; kernels take any."""
    coded: tuple[int, int] = (0, 0)
    """Likewise: the first two counts."""
    arrived: Tensor | None = None
    """int32 `[S]`, of what `prepare` makes: 0 between calls; programs that append count themselves here."""

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def width(self) -> int:
        """D."""
        return self.window_keys.shape[3]

    @property
    def block(self) -> int:
        """G."""
        return self.keys.shape[3]

    @property
    def window(self) -> int:
        return self.window_keys.shape[2]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2] * self.block

    @property
    def block_bytes(self) -> int:
        """Of codes and ranges, keys and values."""
        return self.block * (2 * (self.keys.shape[4] + self.values.shape[3]) + 4 * self.width // self.block * 2)

    @property
    def bytes(self) -> int:
        """What a call has to read of the cache."""
        d, whole = self.width, self.window_keys.element_size()
        total = 0.0
        for bits, count in zip((self.key_bits, self.value_bits), self.coded, strict=True):
            total += count * (d * field(bits) / 8 + 4 * d / self.block) + (self.length - count) * d * whole
        return int(total) * self.keys.shape[0] * self.heads

    def decoded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `[S, KV, capacity, D]`; what lies past n is anything finite."""
        keys = unpacked(self.keys, self.key_bits, self.width).to(dtype)
        step, low = self.key_ranges.to(dtype)[:, :, :, None].unbind(-1)
        values = unpacked(self.values.mT, self.value_bits, self.width).to(dtype)
        values = values.view(*values.shape[:-1], -1, self.block)
        value_step, value_low = self.value_ranges.to(dtype).transpose(3, 4)[..., None, :].unbind(-1)
        at = torch.arange(self.capacity, device=self.keys.device)
        found = []
        for i, (made, window) in enumerate(((keys * step + low, self.window_keys), (values * value_step + value_low, self.window_values))):
            coded = (at < self.counts[:, i, None])[:, None, :, None]
            found.append(torch.where(coded, made.reshape(*window.shape[:2], -1, self.width), window.to(dtype)[:, :, at % self.window]))
        held = (at < self.counts[:, 2, None])[:, None, :, None]
        return torch.where(held, found[0], 0), torch.where(held, found[1], 0)


@dataclass
class Plain:
    """Keys and values `[S, KV, C, D]` as they are, C a multiple of 64; counts as those of `Packed`, of which the last is read."""

    keys: Tensor
    values: Tensor
    counts: Tensor
    block: int = 64

    @property
    def block_bytes(self) -> int:
        return 2 * self.block * self.width * self.keys.element_size()

    @property
    def bytes(self) -> int:
        """What a call has to read of a full cache."""
        return 2 * self.keys.nbytes

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def width(self) -> int:
        return self.keys.shape[3]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def decoded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        held = (torch.arange(self.capacity, device=self.keys.device) < self.counts[:, 2, None])[:, None, :, None]
        return torch.where(held, self.keys.to(dtype), 0), torch.where(held, self.values.to(dtype), 0)


def field(bits: int) -> int:
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def words(bits: int, width: int) -> int:
    return max(FEWEST_WORDS, width * field(bits) // 16)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., D]` of any type ▸ int16 `[..., W]`."""
    w, wide = words(bits, codes.shape[-1]), field(bits)
    made = torch.zeros(*codes.shape[:-1], w, dtype=torch.int32, device=codes.device)
    for j, part in enumerate(torch.split(codes.to(torch.int32), w, -1)):
        made[..., : part.shape[-1]] |= part << j * wide
    return made.to(torch.int16)


def unpacked(held: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `packed`: uint8 `[..., D]`."""
    wide = field(bits)
    planes = [held.to(torch.int32) >> j * wide & 2**wide - 1 for j in range(16 // wide)]
    return torch.cat(planes, -1)[..., :width].to(torch.uint8)


def prepare(
    keys: Tensor,
    values: Tensor,
    key_bits: int,
    value_bits: int,
    group_size: int,
    residual_length: int,
    capacity: int | None = None,
    into: Packed | None = None,
    write: Write | None = None,
) -> Packed:
    """The cache of a prompt whose attention is done, keys and values `[S, KV, n, D]`, with room for `capacity` tokens (n where None).

    into: one that these arguments made for another prompt of as many sequences, whose memory is taken. write: a backend's own, in place of
    torch's. Raises ValueError for what the layout does not hold."""
    made = into or _room(keys, values, key_bits, value_bits, group_size, residual_length, capacity)
    made.coded = _fits(made, keys, values)
    made.length = keys.shape[2]
    (write or _write_prompt)(made, keys, values)
    return made


def _write_prompt(cache: Packed, keys: Tensor, values: Tensor) -> None:
    n, coded = cache.length, cache.coded
    _write_keys(cache, 0, keys[:, :, : coded[0]])
    _write_values(cache, torch.arange(coded[1], device=values.device), values[:, :, : coded[1]])
    for held, x, start in ((cache.window_keys, keys, coded[0]), (cache.window_values, values, coded[1])):
        held[:, :, torch.arange(start, n, device=keys.device) % cache.window] = x[:, :, start:]
    _told(cache, n, coded)


def _room(
    keys: Tensor, values: Tensor, key_bits: int, value_bits: int, group_size: int, residual_length: int, capacity: int | None
) -> Packed:
    """As `prepare`, of which nothing is written yet."""
    s, kv, n, d = keys.shape
    g, r = group_size, residual_length
    if not all(2 <= b <= 8 for b in (key_bits, value_bits)):
        raise ValueError(f"keys of {key_bits} and values of {value_bits} bits; the packed cache has 2 to 8")
    if d not in WIDTHS or g not in GROUPS or d % g:
        raise ValueError(
            f"heads of {d} channels in groups of {g}; the packed cache has heads of {WIDTHS} and groups of {GROUPS} that divide them"
        )
    if r < 1 or r % g:
        raise ValueError(f"residual_length={r}; it must be a multiple of the group size, {g}")
    blocks = -(-max(capacity or n, n, 1) // g)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(s, *shape, dtype=dtype, device=keys.device)

    return Packed(
        empty(kv, blocks, g, words(key_bits, d), dtype=torch.int16),
        empty(kv, blocks, d, 2, dtype=torch.float16),
        empty(kv, blocks, words(value_bits, d), g, dtype=torch.int16),
        empty(kv, blocks, d // g, g, 2, dtype=torch.float16),
        empty(kv, r + g, d, dtype=keys.dtype),
        empty(kv, r + g, d, dtype=values.dtype),
        empty(3, dtype=torch.int32),
        key_bits,
        value_bits,
        r,
        arrived=empty(dtype=torch.int32),
    )


def _fits(cache: Packed, keys: Tensor, values: Tensor) -> tuple[int, int]:
    """How many keys and values of a prompt `[S, KV, n, D]` become codes. Raises ValueError where the cache has no room for it."""
    n = keys.shape[2]
    if not alike(cache, keys, values) or n > cache.capacity:
        raise ValueError(
            f"a prompt of keys {tuple(keys.shape)} and values {tuple(values.shape)}; this cache has room for both of "
            f"[{cache.keys.shape[0]}, {cache.heads}, {cache.capacity}, {cache.width}]"
        )
    return _coded(n, cache.residual)


def alike(cache: Cache, keys: Tensor, values: Tensor) -> bool:
    """Whether they are as many tokens of both, of the cache's sequences, heads and channels."""
    s, kv, _, d = keys.shape
    return keys.shape == values.shape and (s, kv, d) == (cache.keys.shape[0], cache.heads, cache.width)


def append(cache: Packed, keys: Tensor, values: Tensor) -> None:
    """The next 1 to G tokens `[S, KV, T, D]` into the cache, after what earlier ones left to be quantized has been. Raises ValueError."""
    takes(cache, keys, values)
    t, n = keys.shape[2], cache.length
    coded = _coded(n, cache.residual)
    old_keys, old_values = (torch.arange(*bounds, device=keys.device) for bounds in zip(cache.coded, coded, strict=True))
    if len(old_keys):
        _write_keys(cache, cache.coded[0], cache.window_keys[:, :, old_keys % cache.window])
    if len(old_values):
        _write_values(cache, old_values, cache.window_values[:, :, old_values % cache.window])
    at = torch.arange(n, n + t, device=keys.device) % cache.window
    cache.window_keys[:, :, at] = keys.to(cache.window_keys.dtype)
    cache.window_values[:, :, at] = values.to(cache.window_values.dtype)
    _told(cache, n + t, coded)


def takes(cache: Packed, keys: Tensor, values: Tensor) -> None:
    """Raises ValueError where `append` does."""
    if not alike(cache, keys, values) or not 1 <= keys.shape[2] <= cache.block or cache.length + keys.shape[2] > cache.capacity:
        raise ValueError(
            f"got keys {tuple(keys.shape)} and values {tuple(values.shape)}; the cache takes 1 to {cache.block} tokens of both, and has "
            f"room for {cache.capacity - cache.length}: prepare it with a greater capacity"
        )


def ages(cache: Packed) -> bool:
    """Whether the next token turns keys that waited into codes, a whole window of them: `append` alone does that."""
    return _coded(cache.length, cache.residual)[0] > cache.coded[0]


def append_one(cache: Packed, keys: Tensor, values: Tensor) -> None:
    """As `append`, for one token `[S, KV, 1, D]` and where nothing `ages`, but from what stands on the device alone: a captured graph of it
    finds its place in every replay. The host is told by `told_one`."""
    n = cache.counts[0, 2].long()
    due = n - cache.residual - 1
    at = due.clamp(min=0)[None]
    _write_values(cache, at, cache.window_values.index_select(2, at % cache.window), due >= cache.counts[0, 1])
    for held, x in ((cache.window_keys, keys), (cache.window_values, values)):
        held.index_copy_(2, n[None] % cache.window, x.to(held.dtype))
    cache.counts[:, 1] = cache.counts[:, 1].maximum(due + 1)
    cache.counts[:, 2] += 1


def told_one(cache: Packed) -> None:
    """What the host has to know of an `append_one` that the device did."""
    cache.coded = _coded(cache.length, cache.residual)
    cache.length += 1


def _coded(n: int, r: int) -> tuple[int, int]:
    """`Kivi.quantized`."""
    return n - n % r, max(0, n - r)


def _told(cache: Packed, n: int, coded: tuple[int, int]) -> None:
    for i, count in enumerate((*coded, n)):
        cache.counts[:, i].fill_(count)
    cache.length, cache.coded = n, coded


def _rounded(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of groups along the last axis, float32, and `[..., 2]`: step and low, float16."""
    x = groups.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    ranges = torch.cat([(high - low) / (2**bits - 1), low], -1).half()
    held = ranges.float()
    return Affine(held[..., :1], held[..., 1:], bits, ZeroKind.MINIMUM).encode(x), ranges


def _write_keys(cache: Packed, start: int, keys: Tensor) -> None:
    """Tokens from `start`, a multiple of G as is their number."""
    codes, ranges = _rounded(
        keys.reshape(*keys.shape[:2], keys.shape[2] // cache.block, cache.block, keys.shape[3]).mT, cache.key_bits
    )  # [S, KV, blocks, D, G]
    here = slice(start // cache.block, start // cache.block + ranges.shape[2])
    cache.keys[:, :, here] = packed(codes.mT, cache.key_bits)
    cache.key_ranges[:, :, here] = ranges


def _write_values(cache: Packed, at: Tensor, values: Tensor, wanted: Tensor | None = None) -> None:
    """Tokens `at` int64 `[T]`. wanted: a bool on the device; where it is false all stays as it is."""
    codes, ranges = _rounded(values.reshape(*values.shape[:3], cache.width // cache.block, cache.block), cache.value_bits)
    block, inside = at // cache.block, at % cache.block
    # Indices of the tokens come first: [T, S, KV, ...].
    made = packed(codes.flatten(3), cache.value_bits).permute(2, 0, 1, 3), ranges.permute(2, 0, 1, 3, 4)
    for held, new in zip((cache.values, cache.value_ranges), made, strict=True):
        held[:, :, block, :, inside] = new if wanted is None else torch.where(wanted, new, held[:, :, block, :, inside])


def checked(q: Tensor, cache: Cache, scale: float | None, out: Tensor | None) -> tuple[Tensor, float]:
    """`out`, or new memory for it, and the factor of scores. Raises ValueError for what no backend takes."""
    s, kv, d = cache.keys.shape[0], cache.heads, cache.width
    if q.dim() != 3 or (q.shape[0], q.shape[2]) != (s, d) or q.shape[1] % kv or not q.is_floating_point():
        raise ValueError(f"q is {tuple(q.shape)}, {q.dtype}; this cache takes [{s}, a multiple of {kv}, {d}] of a floating-point type")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous()):
        raise ValueError(f"out is {tuple(out.shape)}, {out.dtype}; it must be contiguous {tuple(q.shape)}, {q.dtype}")
    return torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out, d**-0.5 if scale is None else scale
