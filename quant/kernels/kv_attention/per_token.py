"""A cache whose keys and values have their ranges per token (`quant.kv.per_token`): its layout, and what writes it.

Letters as in the package, but G is a group of channels alone, and T the tokens of a block, which share nothing. All tokens are codes, from
the moment that they come: a step reads its own token as it is stored. A value is (code - zero) · step, bit for bit what `quant.kv` reads
before that rounds it to the model's type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.kv_attention import WIDTHS, alike, field, packed, unpacked, words

BLOCK = 64
"""T."""
MOST_GROUPS = 8
"""Of channels of a head: more do not fit the kernel's registers."""


@dataclass
class PerTokenPacked:
    """B blocks of T tokens are room for n. Words of codes are those of `Packed`."""

    keys: Tensor
    """int16 `[S, KV, B, T, W]`."""
    values: Tensor
    """int16 `[S, KV, B, W, T]`: a block's tokens are neighbours."""
    ranges: Tensor
    """int32 `[S, KV, B, D / G, 3, T]`: the float32 step of keys, that of values, and whole zeros of 16 bits, the keys' lower. Symmetric:
    2 for 3, and zeros are 2^(bits-1)."""
    counts: Tensor
    """int32 `[S, 3]` as those of `Packed`, of which the last is read: n."""
    bits: int
    width: int
    """D."""
    clip: float = 1.0
    """Share of a token's range that is kept, for `append` alone."""
    length: int = 0
    """n as the host knows it, for `append` and `bytes` alone, of all sequences."""

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def block(self) -> int:
        return self.keys.shape[3]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2] * self.block

    @property
    def group(self) -> int:
        return self.width // self.ranges.shape[3]

    @property
    def symmetric(self) -> bool:
        return self.ranges.shape[4] == 2

    @property
    def block_bytes(self) -> int:
        """Of codes and ranges, keys and values."""
        return self.block * (4 * self.keys.shape[4] + 4 * self.ranges.shape[3] * self.ranges.shape[4])

    @property
    def bytes(self) -> int:
        """What a call has to read of the cache."""
        token = 2 * self.width * field(self.bits) // 8 + 4 * self.ranges.shape[3] * self.ranges.shape[4]
        return token * self.length * self.keys.shape[0] * self.heads

    def decoded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `[S, KV, capacity, D]`; what lies past n is 0."""
        held = (torch.arange(self.capacity, device=self.keys.device) < self.counts[:, 2, None])[:, None, :, None]
        found = []
        for i, words_of in enumerate((self.keys, self.values.mT)):
            codes = unpacked(words_of, self.bits, self.width).to(dtype)
            codes = codes.view(*codes.shape[:-1], -1, self.group)  # [S, KV, B, T, D / G, G]
            planes = self.ranges.permute(4, 0, 1, 2, 5, 3)[..., None]
            step = planes[i].contiguous().view(torch.float32).to(dtype)
            zero = 2.0 ** (self.bits - 1) if self.symmetric else _half_word(planes[2], i).to(dtype)
            made = ((codes - zero) * step).flatten(-2).flatten(2, 3)
            found.append(torch.where(held, made, 0))
        return found[0], found[1]


def prepare(
    keys: Tensor, values: Tensor, bits: int, symmetric: bool, group_size: int | None, clip: float = 1.0, capacity: int | None = None,
    block: int = BLOCK,
) -> PerTokenPacked:  # fmt: skip
    """The cache of a prompt, keys and values `[S, KV, n, D]`, with room for `capacity` tokens (n where None). group_size: None is D.

    Raises ValueError for what the layout does not hold."""
    s, kv, n, d = keys.shape
    g = group_size or d
    if not 2 <= bits <= 8:
        raise ValueError(f"keys and values of {bits} bits; the packed cache has 2 to 8")
    if d not in WIDTHS or g not in WIDTHS or d % g or d // g > MOST_GROUPS:
        raise ValueError(
            f"heads of {d} channels in groups of {g}; the packed cache has heads of {WIDTHS} and groups of as many that divide them, "
            f"at most {MOST_GROUPS} to a head"
        )
    blocks = -(-max(capacity or n, n, 1) // block)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(s, *shape, dtype=dtype, device=keys.device)

    made = PerTokenPacked(
        empty(kv, blocks, block, words(bits, d), dtype=torch.int16),
        empty(kv, blocks, words(bits, d), block, dtype=torch.int16),
        empty(kv, blocks, d // g, 2 if symmetric else 3, block, dtype=torch.int32),
        empty(3, dtype=torch.int32),
        bits,
        d,
        clip,
    )
    if n:
        append(made, keys, values)
    return made


def append(cache: PerTokenPacked, keys: Tensor, values: Tensor) -> None:
    """The next tokens `[S, KV, t, D]` into the cache, any number of them. Raises ValueError."""
    t, n = keys.shape[2], cache.length
    if not alike(cache, keys, values) or n + t > cache.capacity:
        raise ValueError(
            f"got keys {tuple(keys.shape)} and values {tuple(values.shape)}; the cache takes as many tokens of both, and has "
            f"room for {cache.capacity - n}: prepare it with a greater capacity"
        )
    _write(cache, torch.arange(n, n + t, device=keys.device), keys, values)
    cache.length = n + t
    cache.counts.fill_(cache.length)


def append_one(cache: PerTokenPacked, keys: Tensor, values: Tensor) -> None:
    """As `append`, for one token `[S, KV, 1, D]`, but from what stands on the device alone: a captured graph of it finds its place in
    every replay. The host counts `length` itself."""
    _write(cache, cache.counts[0, 2:].long(), keys, values)
    cache.counts += 1


def _write(cache: PerTokenPacked, at: Tensor, keys: Tensor, values: Tensor) -> None:
    """Tokens `at` int64 `[t]`."""
    s, kv, t, _ = keys.shape
    both = torch.stack((keys, values))
    made = kernel("fake_quantize", device=keys.device).run.encode(both.reshape(-1, cache.group), cache.bits, cache.symmetric, cache.clip)
    half = 2 ** (cache.bits - 1)
    # Codes and zeros come less `half`.
    held = packed(made.codes.to(torch.int32).view(2, s, kv, t, cache.width) + half, cache.bits)
    step, zero = (x.view(2, s, kv, t, -1) for x in (made.scale, made.zero + half))
    planes = [*step.view(torch.int32)]
    if not cache.symmetric:
        lower, upper = zero.to(torch.int32)
        planes.append(upper << 16 | lower & 0xFFFF)
    block, inside = at // cache.block, at % cache.block
    cache.keys[:, :, block, inside] = held[0]
    # Indices of the tokens come first: [t, S, KV, ...].
    cache.values[:, :, block, :, inside] = held[1].permute(2, 0, 1, 3)
    cache.ranges[:, :, block, :, :, inside] = torch.stack(planes, -1).permute(2, 0, 1, 3, 4)


def _half_word(both: Tensor, upper: int) -> Tensor:
    """The signed lower or upper 16 bits of int32."""
    return both >> 16 if upper else both << 16 >> 16
