"""KIVI (arXiv 2402.02750): keys per channel, values per token, the latest tokens in full precision.

Objective: none, round to nearest in groups of G values: x ≈ code · s + min, s = (max - min) / (2^b - 1), s and min stored in
`scale_dtype`. Groups of keys (after the rotary embedding) run over G consecutive tokens of one channel, groups of values over G
consecutive channels of one token. With n tokens held and their attention done, the first n - n mod R keys and the first n - R
values are quantized; the others wait in full precision. A step reads the cache before it ages: new tokens attend to themselves and
to up to R keys (R + 1 values) in full precision, and a prompt reads itself in full precision. This one rule is the reference's prefill
and decode rules together, and does not depend on how tokens were split into steps.

Defaults: 2 bits, G = 32, R = 128 (the paper's experiments). Departures: a group of equal values is its minimum (the reference
divides by zero); codes are chosen for the scale and minimum as stored. The residual is in the model's own type, counted as 16 bits.
Bits of a quantized token: b + 32 / G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.grids import DTYPES
from quant.kv.base import FULL, KVState, check_bits, stored


def round_groups(x: Tensor, bits: int, group_size: int, dim: int, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Fake quantization on KIVI's grid of `group_size` consecutive values along `dim`; computed in float32, x's shape and type.

    Raises ValueError where groups do not divide the dimension, NonFiniteError, and ScaleDtypeError where `scale_dtype` overflows."""
    if x.shape[dim] % group_size:
        raise ValueError(f"group_size={group_size} does not divide {x.shape[dim]} values along dimension {dim} of {tuple(x.shape)}")
    if not x.numel():
        return x
    moved = x.movedim(dim, -1)
    groups = moved.float().reshape(*moved.shape[:-1], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = stored((high - low) / (2**bits - 1), scale_dtype, "ranges of the cache")
    affine = Affine(scale, stored(low, scale_dtype, "minima of the cache"), bits, ZeroKind.MINIMUM)
    return affine.round(groups).flatten(-2).to(x.dtype).movedim(-1, dim)


@dataclass(frozen=True)
class Kivi:
    name: ClassVar[str] = "kivi"
    version: ClassVar[int] = 1
    pre_rope: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    key_bits: int = 2
    """2 to 8; 16 leaves keys alone."""
    value_bits: int = 2
    group_size: int = 32
    """G: tokens of a channel (keys) or channels of a token (values) that share scale and minimum."""
    residual_length: int = 128
    """R, a multiple of G: tokens in full precision."""
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_bits(self.name, self.key_bits, tuple(range(2, 9)))
        check_bits(self.name, self.value_bits, tuple(range(2, 9)))
        if self.group_size < 1 or self.residual_length < 1 or self.residual_length % self.group_size:
            raise ValueError(
                f"kivi with residual_length={self.residual_length} and group_size={self.group_size}: "
                "give a residual length that is a multiple of the group size"
            )
        if self.scale_dtype not in DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype}; choose {' or '.join(DTYPES)}")

    def refuses(self, head_dim: int) -> str | None:
        if head_dim % self.group_size:
            return f"kv.group_size={self.group_size} does not divide a head of {head_dim} channels"
        return None

    def calibrate(self, keys: Tensor, values: Tensor, key_weights: Tensor | None = None, value_weights: Tensor | None = None) -> Kivi:
        return self

    def new_state(
        self, batch: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> KVState:
        return _State(self, batch, heads, head_dim, dtype, device)

    def quantized(self, length: int) -> tuple[int, int]:
        """How many keys and values, the first ones, are quantized when `length` tokens are held and their attention is done."""
        return length - length % self.residual_length, max(0, length - self.residual_length)

    def bits(self, length: int, heads: int, head_dim: int) -> float:
        overhead = 2 * 8 * DTYPES[self.scale_dtype].itemsize / self.group_size
        parts = []
        for bits, count in zip((self.key_bits, self.value_bits), self.quantized(length), strict=True):
            held = FULL if bits == FULL else bits + overhead
            parts.append((count * held + (length - count) * FULL) / max(1, length))
        return sum(parts) / 2

    def keys_rounded(self, keys: Tensor) -> Tensor:
        """`[..., T, D]`, T a multiple of the group size."""
        return keys if self.key_bits == FULL else round_groups(keys, self.key_bits, self.group_size, -2, DTYPES[self.scale_dtype])

    def values_rounded(self, values: Tensor) -> Tensor:
        """`[..., T, D]`."""
        return values if self.value_bits == FULL else round_groups(values, self.value_bits, self.group_size, -1, DTYPES[self.scale_dtype])


class _State(KVState):
    _rule: Kivi
    _aged = (0, 0)
    """Keys and values that are quantized."""

    def together(self) -> int:
        # Up to R tokens nothing ages; after that every step quantizes a value.
        return max(1, self._rule.residual_length - self.length)

    def _settle(self) -> None:
        (k, v), (keys, values) = self._aged, self._rule.quantized(self.length)
        if keys > k:
            self._keys[:, :, k:keys] = self._rule.keys_rounded(self._keys[:, :, k:keys])
        if values > v:
            self._values[:, :, v:values] = self._rule.values_rounded(self._values[:, :, v:values])
        self._aged = (keys, values)
