"""The stored format `affine`: integer codes with a scale and a zero per group.

Payload (short name: type, shape)
  codes: uint8 bit stream of N·K codes, row-major · scale: float16 or float32 `[R, G]`, R = N (1 for one scale per tensor)
  zero: a bit stream of R·G codes (code), int16 `[R, G]` (integer), like the scale (float, minimum), absent (constant)
  g_idx: group of each column `[K]`, uint8, int16 or int32; only when groups are not consecutive columns
  input_scale: float16 or float32 `[K]`; only when the weight was multiplied by it and nothing before divides by it
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.tensors.base import Coded
from quant.tensors.packing import narrowest, pack_bits, unpack_bits


@dataclass(frozen=True)
class AffineTensor(Coded):
    format: ClassVar[str] = "affine"

    scale: Tensor
    """float16 or float32 `[R, G]`."""
    zero: Tensor
    """`[R, G]`: uint8 (constant, code), int16 (integer) or like the scale (float, minimum)."""
    bits: int
    kind: ZeroKind
    g_idx: Tensor | None = None
    """Integers `[K]`."""
    stream: Tensor | None = field(default=None, kw_only=True)
    """The codes as `pack` stores them, where they were made along with the codes."""

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        r, g = self.scale.shape
        if r not in (1, n) or (self.g_idx is None and k % g) or self.zero.shape != self.scale.shape:
            raise ValueError(f"codes {(n, k)}, scale {(r, g)} and zero {tuple(self.zero.shape)} do not belong together")

    @staticmethod
    def build(codes: Tensor, affine: Affine, scale_dtype: torch.dtype, *, g_idx: Tensor | None = None) -> AffineTensor:
        """From codes `[N, K]`, whole numbers of any type, and scale and zero `[R, G]` that are already rounded to `scale_dtype`."""
        return AffineTensor(
            codes=codes.to(torch.uint8).contiguous(),
            scale=affine.scale.to(scale_dtype).contiguous(),
            zero=affine.zero.to(affine.kind.dtype(scale_dtype)).contiguous(),
            bits=affine.bits,
            kind=affine.kind,
            g_idx=None if g_idx is None else g_idx.to(narrowest(affine.scale.shape[1] - 1)),
        )

    @property
    def group_size(self) -> int:
        """Columns per group."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def bits_nominal(self) -> float:
        return float(self.bits)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def columns(self, per_group: Tensor) -> Tensor:
        """`[R, G]` ▸ float32 `[R, K]`: the value of each column's group."""
        if self.g_idx is not None:
            return per_group.float()[:, self.g_idx.long()]
        return per_group.float().repeat_interleave(self.group_size, dim=1)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """`[N, K]` as the codes have it, before the input scale."""
        scale, zero = self.columns(self.scale).to(dtype), self.columns(self.zero).to(dtype)
        return Affine(scale, zero, self.bits, self.kind).decode(self.codes.to(dtype))

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        return self.unscaled(self.decoded(torch.float32))

    @cached_property
    def _stream(self) -> Tensor:
        return pack_bits(self.codes, self.bits) if self.stream is None else self.stream

    def pack(self) -> dict[str, Tensor]:
        payload = {"codes": self._stream, "scale": self.scale}
        if self.kind is ZeroKind.CODE:
            payload["zero"] = pack_bits(self.zero, self.bits)
        elif self.kind is not ZeroKind.CONSTANT:
            payload["zero"] = self.zero
        if self.g_idx is not None:
            payload["g_idx"] = self.g_idx
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits, "zero": self.kind.value}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> AffineTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), bits, kind = meta["shape"], int(meta["bits"]), ZeroKind(meta["zero"])
        scale = payload["scale"]
        if kind is ZeroKind.CONSTANT:
            zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=scale.device)
        elif kind is ZeroKind.CODE:
            zero = unpack_bits(payload["zero"], bits, math.prod(scale.shape)).view(scale.shape)
        else:
            zero = payload["zero"]
        codes = unpack_bits(payload["codes"], bits, n * k).view(n, k)
        return AffineTensor(codes, scale, zero, bits, kind, payload.get("g_idx"), input_scale=payload.get("input_scale"))
