"""The stored format `mixed`: groups of columns with widths of their own, within one bit of a base width (SliM-LLM).

w ≈ (code - zero) · scale in groups of 2 to 8 bits; w ≈ mean ± scale in groups of 1 bit.
Payload (short name: type, shape; g columns per group, G groups)
  widths: 2-bit stream of G codes, width - base + 1
  codes_b: b-bit stream of N · G_b · g codes, row-major, for every width b that G_b > 0 groups have: a 1-bit group fills one bit per weight
  scale: float16 or float32 `[N, G]` · zero_b: b-bit stream of N · G_b codes, b of 2 or more · mean: like the scale, `[N, G_1]`
  input_scale: float16 or float32 `[K]`; only when the weight was multiplied by it and nothing before divides by it
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.tensors.base import Coded
from quant.tensors.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class MixedTensor(Coded):
    format: ClassVar[str] = "mixed"

    codes: Tensor
    """uint8 `[N, K]`; 0 or 1 in 1-bit groups."""
    scale: Tensor
    """float16 or float32 `[N, G]`."""
    zero: Tensor
    """uint8 `[N, G]`; 0 in 1-bit groups."""
    mean: Tensor
    """`[N, G_1]`, like the scale: of the 1-bit groups, in order."""
    widths: tuple[int, ...]
    """Bits of each group, within one of `base`."""
    base: int
    """Bits asked for."""

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        g = len(self.widths)
        shapes = tuple(self.scale.shape), tuple(self.zero.shape), tuple(self.mean.shape)
        if not g or k % g or shapes != ((n, g), (n, g), (n, self.widths.count(1))):
            raise ValueError(f"codes {(n, k)}, {g} widths, and scale, zero, mean {shapes} do not belong together")
        if any(not 1 <= b <= 8 or abs(b - self.base) > 1 for b in self.widths):
            raise ValueError(f"widths {sorted(set(self.widths))} must lie between 1 and 8 and within 1 of the base width {self.base}")

    @property
    def group_size(self) -> int:
        """Columns per group."""
        return self.shape[1] // len(self.widths)

    @property
    def bits_nominal(self) -> float:
        """Mean width of the groups."""
        return sum(self.widths) / len(self.widths)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[N, K]` in a float type of your choice; float64 shows what a float64 solver worked with."""
        n, k = self.shape
        codes, scale = self.codes.to(dtype).view(n, -1, self.group_size), self.scale.to(dtype)[..., None]
        weight = (codes - self.zero.to(dtype)[..., None]) * scale
        ones = _groups_of(self.widths, 1)
        if ones:
            weight[:, ones] = (2 * codes[:, ones] - 1) * scale[:, ones] + self.mean.to(dtype)[..., None]
        weight = weight.view(n, k)
        return self.unscaled(weight)

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        return self.values()

    def pack(self) -> dict[str, Tensor]:
        n = self.shape[0]
        codes = self.codes.view(n, -1, self.group_size)
        payload = {"widths": pack_bits(torch.tensor(self.widths, device=codes.device) - self.base + 1, 2), "scale": self.scale}
        for bits in sorted(set(self.widths)):
            of = _groups_of(self.widths, bits)
            payload[f"codes_{bits}"] = pack_bits(codes[:, of], bits)
            if bits == 1:
                payload["mean"] = self.mean
            else:
                payload[f"zero_{bits}"] = pack_bits(self.zero[:, of], bits)
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "base": self.base, "groups": len(self.widths)}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> MixedTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), base, groups = meta["shape"], int(meta["base"]), int(meta["groups"])
        widths = tuple(int(c) + base - 1 for c in unpack_bits(payload["widths"], 2, groups).tolist())
        size, scale = k // groups, payload["scale"]
        codes = torch.zeros(n, groups, size, dtype=torch.uint8, device=scale.device)
        zero = torch.zeros(n, groups, dtype=torch.uint8, device=scale.device)
        for bits in sorted(set(widths)):
            of = _groups_of(widths, bits)
            codes[:, of] = unpack_bits(payload[f"codes_{bits}"], bits, n * len(of) * size).view(n, len(of), size)
            if bits > 1:
                zero[:, of] = unpack_bits(payload[f"zero_{bits}"], bits, n * len(of)).view(n, len(of))
        mean = payload["mean"] if 1 in widths else scale.new_zeros(n, 0)
        return MixedTensor(codes.view(n, k), scale, zero, mean, widths, base, input_scale=payload.get("input_scale"))


def bits_formula(widths: Sequence[int], n: int, group_size: int, scale_bits: int = 16) -> float:
    """Mean over groups of b + (s + b) / g, plus 2 / (g N) for the width codes; 1-bit groups keep a mean of s bits as their zero.

    Without 1-bit groups, and with as many wider groups as narrower ones: base + (s + base) / g + 2 / (g N).
    """
    per_group = [b + (scale_bits + (scale_bits if b == 1 else b)) / group_size for b in widths]
    return sum(per_group) / len(widths) + 2 / (group_size * n)


def _groups_of(widths: Sequence[int], bits: int) -> list[int]:
    return [i for i, b in enumerate(widths) if b == bits]
