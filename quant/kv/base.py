"""What a KV-cache quantizer is, and the buffers that all of them share.

Letters: B sequences, H key/value heads, D channels of a head, T tokens of one append, n tokens held. Keys and values are
`[B, H, T, D]` of any floating-point type.

A state answers one question: what does attention read at this step? `append` adds the tokens that are about to attend, `read`
gives keys and values as those tokens see them: earlier tokens as the method stores them, the full-precision residual in front.
Values are kept as what decoding the stored codes gives, so that a read costs nothing; scales are rounded to their stored type first.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError, require_finite

FULL = 16
"""Bits that mean: not quantized."""


class KVState:
    """The cache of one layer. `read` returns views into buffers that later calls overwrite."""

    def __init__(self, rule: KVQuantizer, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._rule = rule
        self.length = 0
        self._keys = torch.empty(batch, heads, 0, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """`[B, H, T, D]` each, the next T tokens. Raises ValueError for another shape."""
        b, h, _, d = self._keys.shape
        if keys.shape != values.shape or keys.dim() != 4 or (*keys.shape[:2], keys.shape[3]) != (b, h, d):
            raise ValueError(f"got keys {tuple(keys.shape)} and values {tuple(values.shape)}; this cache takes [{b}, {h}, T, {d}] of both")
        self._settle()
        start, end = self.length, self.length + keys.shape[2]
        self._grow(end)
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self.length = end
        self._written(start)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, n, D]` as the tokens of the last append see them."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes what sequence `index[i]` was (beam search); `index` `[B']` int64."""
        self._keys = self._keys.index_select(0, index)
        self._values = self._values.index_select(0, index)

    def together(self) -> int | None:
        """How many next tokens may come in one append and read the same as one by one; None for any number."""
        return None

    def _settle(self) -> None:
        """Quantize what earlier steps left to be quantized after their attention."""

    def _written(self, start: int) -> None:
        """Quantize tokens from `start` on, where the method does so before attention."""

    def _grow(self, needed: int) -> None:
        held = self._keys.shape[2]
        if needed <= held:
            return
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            b, h, _, d = old.shape
            new = torch.empty(b, h, max(needed, 2 * held), d, dtype=old.dtype, device=old.device)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)


class KVQuantizer(Protocol):
    """A frozen dataclass with the method's parameters as fields; calibrated facts are fields as well."""

    name: ClassVar[str]
    version: ClassVar[int]
    pre_rope: ClassVar[bool]
    """Keys are given before the rotary embedding, which is applied to what `read` returns."""
    needs: ClassVar[frozenset[str]]
    """`kv` where `calibrate` must be called first."""

    def refuses(self, head_dim: int) -> str | None:
        """Why heads of this width cannot be quantized; None where they can."""
        ...

    def calibrate(
        self, keys: Tensor, values: Tensor, key_weights: Tensor | None = None, value_weights: Tensor | None = None
    ) -> KVQuantizer:
        """A quantizer for the layer whose keys and values of calibration tokens are given, `[tokens, H D]` each (with Fisher
        weights of the same shape). Itself where nothing is calibrated."""
        ...

    def new_state(
        self, batch: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> KVState: ...

    def bits(self, length: int, heads: int, head_dim: int) -> float:
        """Stored bits per value, keys and values together, when `length` tokens are held and their attention is done."""
        ...


def check_bits(name: str, bits: int, allowed: tuple[int, ...]) -> None:
    """Raises ValueError."""
    if bits not in (*allowed, FULL):
        raise ValueError(f"{name} of bits={bits}; allowed: {', '.join(map(str, allowed))}, or {FULL} for full precision")


def stored(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`x` as its stored type holds it, in x's own type. Raises NonFiniteError, and ScaleDtypeError where that type overflows."""
    kept = x.to(dtype).to(x.dtype)
    if not torch.isfinite(kept).all():
        require_finite(what, x)
        raise ScaleDtypeError(
            f"{what} up to {float(x.abs().max()):.3g} do not fit {dtype}; a cache of kv.kind=per_token has float32 ranges, and so have "
            "quantizers made with scale_dtype=float32"
        )
    return kept
