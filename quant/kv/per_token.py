"""Plain per-token quantization: every key (after the rotary embedding) and value on the range of its own token and head, or of
`group_size` channels of it, before attention reads it (QLLM-Eval, arXiv 2402.18158; QuaRot's and SpinQuant's KV option).

Objective: none, round to nearest. Grid: quant/activation.py, ranges in float32. Stored: `bits` a value, a 32-bit scale a group,
and, on the asymmetric grid, a 16-bit zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.activation import fake_quantize_kv
from quant.hadamard import mix
from quant.kv.base import FULL, KVState, check_bits
from quant.scheme import KVScheme


@dataclass(frozen=True)
class PerToken:
    name: ClassVar[str] = "per_token"
    version: ClassVar[int] = 1
    pre_rope: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    bits_per_value: int = 4
    """2 to 8; 16 stores what comes."""
    symmetric: bool = False
    group_size: int | None = None
    """Channels of a head that share a scale; None for one scale per token and head."""
    clip: float = 1.0
    """Share of the range that is kept."""
    mixed: int = 0
    """Consecutive channels of a head that a Hadamard matrix mixes while keys are rounded, of a rotated model; 0: none."""

    def __post_init__(self) -> None:
        check_bits(self.name, self.bits_per_value, tuple(range(2, 9)))

    def refuses(self, head_dim: int) -> str | None:
        if self.group_size is not None and head_dim % self.group_size:
            return f"kv.group_size={self.group_size} does not divide a head of {head_dim} channels"
        return None

    def calibrate(self, keys: Tensor, values: Tensor, key_weights: Tensor | None = None, value_weights: Tensor | None = None) -> PerToken:
        return self

    def new_state(
        self, batch: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> KVState:
        return _State(self, batch, heads, head_dim, dtype, device)

    def bits(self, length: int, heads: int, head_dim: int) -> float:
        if self.bits_per_value == FULL:
            return float(FULL)
        return self.bits_per_value + (32 if self.symmetric else 48) / (self.group_size or head_dim)

    def keys_rounded(self, keys: Tensor) -> Tensor:
        """`[B, H, T, D]`."""
        # (q M) · Q(k M) = q · (Q(k M) Mᵀ): turned back here, queries may stay as they are.
        return mix(self.values_rounded(mix(keys, self.mixed)), self.mixed, transpose=True)

    def values_rounded(self, values: Tensor) -> Tensor:
        """`[B, H, T, D]`."""
        if self.bits_per_value == FULL:
            return values
        return fake_quantize_kv(values, KVScheme(self.bits_per_value, self.symmetric, self.group_size, clip=self.clip))


class _State(KVState):
    _rule: PerToken

    def _written(self, start: int) -> None:
        if self._rule.bits_per_value != FULL:
            new = slice(start, self.length)
            self._keys[:, :, new] = self._rule.keys_rounded(self._keys[:, :, new])
            self._values[:, :, new] = self._rule.values_rounded(self._values[:, :, new])
