"""Affine codes: w ≈ (codes − zero) · scale, with a few rules for what the zero is.

Letters: weight `[N, K]` (out, in), groups `G = K // group_size`, scale and zero `[N, G]`. Rounding is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from quant.scheme import Granularity, WeightScheme


class ZeroKind(str, Enum):
    """What the zero is and how it is stored."""

    CONSTANT = "constant"
    """2^(bits-1), not stored: symmetric grids."""
    CODE = "code"
    """An integer in 0 .. 2^bits - 1, stored in `bits` bits."""
    INTEGER = "integer"
    """An integer that may lie outside the codes, stored in 16 bits."""
    FLOAT = "float"
    """A real number in units of codes, stored like the scale (HQQ)."""
    MINIMUM = "minimum"
    """The smallest weight itself, w ≈ codes · scale + zero, stored like the scale (KIVI)."""

    def dtype(self, scale_dtype: torch.dtype) -> torch.dtype:
        """Of zeros, before those that are codes are packed."""
        whole = {ZeroKind.CONSTANT: torch.uint8, ZeroKind.CODE: torch.uint8, ZeroKind.INTEGER: torch.int16}
        return whole.get(self, scale_dtype)


@dataclass(frozen=True)
class Affine:
    """Scale and zero of groups; both `[..., 1]` against values `[..., g]`, or any shapes that broadcast."""

    scale: Tensor
    zero: Tensor
    bits: int
    kind: ZeroKind
    tops: Tensor | None = None
    """Largest code of every row, as scales broadcast, where rows have bits of their own; `bits` is then the most of theirs."""

    @property
    def top(self) -> int:
        return int(2**self.bits - 1)

    def encode(self, w: Tensor) -> Tensor:
        """Nearest codes, as floats in 0 .. 2^bits - 1."""
        if self.kind is ZeroKind.MINIMUM:
            # A group of equal values has scale 0; its minimum alone is exact.
            steps = torch.where(self.scale == 0, 0.0, (w - self.zero) / torch.where(self.scale == 0, 1.0, self.scale))
            return self._limited(steps).round()
        if self.kind is ZeroKind.FLOAT:
            return self._limited((w / self.scale).add_(self.zero).round_())
        # In place: on a CPU the memory of five temporaries costs more than the arithmetic.
        return self._limited((w / self.scale).round_().add_(self.zero))

    def of_group(self, g: int) -> Affine:
        """Of scale and zero `[G, ...]` those of one group."""
        return replace(self, scale=self.scale[g], zero=self.zero[g])

    def per_group(self) -> Affine:
        """Scale and zero `[..., 1]` ▸ `[...]`, as they are stored."""
        return replace(self, scale=self.scale[..., 0], zero=self.zero[..., 0])

    def _limited(self, codes: Tensor) -> Tensor:
        """The codes may be changed in place."""
        if self.tops is None:
            return codes.clamp_(0, self.top)
        return codes.clamp_(min=0).minimum(self.tops.to(codes))

    def decode(self, codes: Tensor) -> Tensor:
        """Values of float codes."""
        if self.kind is ZeroKind.MINIMUM:
            return codes * self.scale + self.zero
        return (codes - self.zero) * self.scale

    def round(self, w: Tensor) -> Tensor:
        """Nearest representable values."""
        codes = self.encode(w)
        if self.kind is ZeroKind.MINIMUM:
            return codes.mul_(self.scale).add_(self.zero)
        return codes.sub_(self.zero).mul_(self.scale)


def group_width(scheme: WeightScheme, n: int, k: int) -> int:
    """Values that share a scale in `[N, K]`; raises ValueError when groups do not divide K."""
    if scheme.granularity is Granularity.TENSOR:
        return n * k
    if scheme.granularity is Granularity.CHANNEL:
        return k
    g = scheme.group_size
    assert g is not None
    if k % g:
        divisors = [d for d in range(1, k + 1) if k % d == 0]
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - g))[:6])
        raise ValueError(f"group_size={g} does not divide in_features={k}; choose one of {', '.join(map(str, nearest))}")
    return g


@lru_cache(maxsize=32)
def group_of_each(k: int, width: int) -> tuple[int, ...]:
    """Of columns 0 .. k - 1, in groups of neighbours."""
    return tuple(j // width for j in range(k))


def grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """`[N, K]` ▸ `[N, G, g]`, or `[1, 1, N K]` for one scale per tensor."""
    n, k = weight.shape
    g = group_width(scheme, n, k)
    return weight.reshape(1, 1, g) if scheme.granularity is Granularity.TENSOR else weight.reshape(n, k // g, g)
