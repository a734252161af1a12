"""The stored format `partially_binary`: a few weights as codes of several bits, the others as signs.

Payload (short name: type, shape)
  mask: uint8 bit stream of N·K flags, row-major, 1 = a code · signs: bit stream of the flags that are 0, 1 = plus
  codes: bit stream of `high_bits` per flag that is 1 · high_scale: float16 or float32 `[N, 1]` · high_zero: bit stream of N
  codes · scale, mean: float16 or float32 `[N, G]`, of the signs, G = ceil(K / group) · input_scale: as in `affine`
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.accounting import SCALE_BITS
from quant.affine import Affine, ZeroKind
from quant.tensors.base import Coded
from quant.tensors.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class PartiallyBinaryTensor(Coded):
    format: ClassVar[str] = "partially_binary"

    codes: Tensor
    """uint8 `[N, K]`: codes, and 0 (minus) or 1 (plus) where the mask is False."""
    mask: Tensor
    """bool `[N, K]`, True where a weight has a code."""
    high_scale: Tensor
    """float16 or float32 `[N, 1]`."""
    high_zero: Tensor
    """uint8 `[N, 1]`."""
    scale: Tensor
    """float16 or float32 `[N, G]`."""
    mean: Tensor
    """Like scale `[N, G]`."""
    high_bits: int
    group: int
    """Columns per scale; the last group may be smaller."""
    low_fraction: float
    """As asked for, for the paper's label."""

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = (n, -(-k // self.group))
        if self.mask.shape != (n, k) or self.scale.shape != groups or self.mean.shape != groups or self.high_scale.shape != (n, 1):
            raise ValueError(f"{n} x {k} codes in groups of {self.group} and scales {tuple(self.scale.shape)} do not belong together")

    @property
    def bits_nominal(self) -> float:
        """(1 - f) · high_bits + f: the mask is left out."""
        return (1 - self.low_fraction) * self.high_bits + self.low_fraction

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[N, K]` in a float type of your choice; float64 shows what a float64 solver worked with."""
        codes = self.codes.to(dtype)
        high = Affine(self.high_scale.to(dtype), self.high_zero.to(dtype), self.high_bits, ZeroKind.CODE).decode(codes)
        scale, mean = (t.to(dtype).repeat_interleave(self.group, dim=1)[:, : codes.shape[1]] for t in (self.scale, self.mean))
        return self.unscaled(torch.where(self.mask, high, torch.where(codes > 0, scale, -scale) + mean))

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        return self.values()

    def pack(self) -> dict[str, Tensor]:
        payload = {
            "mask": pack_bits(self.mask, 1),
            "signs": pack_bits(self.codes[~self.mask], 1),
            "codes": pack_bits(self.codes[self.mask], self.high_bits),
            "high_scale": self.high_scale,
            "high_zero": pack_bits(self.high_zero, self.high_bits),
            "scale": self.scale,
            "mean": self.mean,
        }
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "high_bits": self.high_bits, "group": self.group, "low_fraction": self.low_fraction}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> PartiallyBinaryTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), high_bits = meta["shape"], int(meta["high_bits"])
        mask = unpack_bits(payload["mask"], 1, n * k).view(n, k).bool()
        high = int(mask.sum())
        codes = torch.empty(n, k, dtype=torch.uint8, device=mask.device)
        codes[~mask] = unpack_bits(payload["signs"], 1, n * k - high)
        codes[mask] = unpack_bits(payload["codes"], high_bits, high)
        zero = unpack_bits(payload["high_zero"], high_bits, n).view(n, 1)
        return PartiallyBinaryTensor(
            codes,
            mask,
            payload["high_scale"],
            zero,
            payload["scale"],
            payload["mean"],
            high_bits,
            int(meta["group"]),
            float(meta["low_fraction"]),
            input_scale=payload.get("input_scale"),
        )


def bits_formula(shape: tuple[int, int], low_share: float, high_bits: int, group: int, scale_dtype: str) -> float:
    """Stored bits of the format: (1 - f) · high_bits + f + 1 (mask), a scale and a zero per row, a scale and a mean per row and
    group. f is the share of signs: 10 % of codes at 8 bits take 2.7 bits and the scales."""
    k = shape[1]
    scale_bits = SCALE_BITS[scale_dtype]
    groups = -(-k // group)
    return (1 - low_share) * high_bits + low_share + 1 + (scale_bits + high_bits + 2 * groups * scale_bits) / k
