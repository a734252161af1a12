"""Codebooks of eight weights on the E8 lattice (QuIP#, arXiv 2402.04396, section 4.2 and appendix).

E8P: 65,536 vectors, 2 bits a weight. A code is pattern << 8 | flips. Of 256 patterns of absolute values, half-integers, 227 are all
those with squared norm up to 10, in lexicographic order, and 29 more have norm 12: five 3/2 and three 1/2. The last coordinate is
negative where the sum of a pattern would be odd; an even number of signs is then flipped, so that every sum is even; and 1/4 is
added to all coordinates, or subtracted. `flips` holds one bit a coordinate, even coordinates in bits 0 to 3, odd ones in bits 4 to
7; bit 0 is inverted where 1/4 is subtracted, which the odd number of bits tells.

E81B: 256 vectors, 1 bit a weight, for residuals: the origin, the 240 roots of E8, and 15 of norm 4 on the axes, (0, .., 0, -2) left out.
The index order of E81B is our own: origin, roots in lexicographic order, axes in lexicographic order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

DIMENSION = 8
CHUNK = 4096
"""Vectors searched at a time: 32 MiB of scores."""


@cache
def patterns() -> Tensor:
    """`[256, 8]` absolute values, float64."""
    values = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    every = torch.cartesian_prod(*[values] * DIMENSION)
    small = every[every.square().sum(1) <= 10]
    # The 29 have one 1/2 in the first half and two in the second, or three in the first (28 = 4 x 6 + 4, less (1; 4, 5)), and two more.
    halves = [tuple(i for i in range(4) if i != kept) for kept in range(4)]
    halves += [(first, *last) for first in (3, 2, 1, 0) for last in combinations(range(4, 8), 2) if (first, *last) != (1, 4, 5)]
    halves += [(0, 1, 4), (2, 3, 7)]
    large = torch.full((len(halves), DIMENSION), 1.5, dtype=torch.float64)
    for row, positions in zip(large, halves, strict=True):
        row[list(positions)] = 0.5
    return torch.cat([small, large])


@cache
def _bases() -> Tensor:
    """`[256, 8]`: patterns with the sign that makes their sum even."""
    base = patterns().clone()
    base[base.sum(1) % 2 != 0, -1] *= -1
    return base


def _bit_of() -> Tensor:
    """Bit of every coordinate in `flips`."""
    i = torch.arange(DIMENSION)
    return i // 2 + 4 * (i % 2)


@cache
def e8p_codewords() -> Tensor:
    """`[65536, 8]` float32, by code."""
    code = torch.arange(1 << 16)
    low = code & 255
    odd = (low[:, None] >> torch.arange(8) & 1).sum(1) % 2
    flips = low ^ odd
    signs = 1 - 2 * (flips[:, None] >> _bit_of() & 1)
    shift = torch.where(odd == 1, -0.25, 0.25)
    return (_bases()[code >> 8] * signs + shift[:, None]).float()


@cache
def _candidates() -> tuple[Tensor, Tensor]:
    """Of targets whose coordinates are positive, the last one perhaps not, the nearest codeword without its shift is among these: per
    pattern its base, and the base with the last and one other sign flipped. Vectors `[2048, 8]` and codes (pattern << 8 | flips)."""
    base = _bases()
    flipped = torch.ones(DIMENSION, DIMENSION, dtype=torch.float64)
    for i in range(DIMENSION - 1):
        flipped[i, [i, -1]] = -1
    vectors = (base[:, None] * flipped[None]).reshape(-1, DIMENSION)
    flips = ((flipped < 0).long() << _bit_of()).sum(1)
    codes = (torch.arange(256)[:, None] << 8 | flips[None]).reshape(-1)
    return vectors, codes


def _nearest_e8p(x: Tensor) -> Tensor:
    vectors, candidate_codes = (t.to(x.device) for t in _candidates())
    vectors = vectors.to(x)
    half_norm = vectors.square().sum(1) / 2
    bit = _bit_of().to(x.device)
    found: list[tuple[Tensor, Tensor]] = []
    for shift in (0.25, -0.25):
        target = x - shift
        # An even number of signs makes all coordinates positive but the last; the lattice is the same after it.
        negative = target < 0
        negative[:, -1] ^= negative.sum(1) % 2 == 1
        folded = torch.where(negative, -target, target)
        score = torch.addmm(-half_norm, folded, vectors.T)
        best, index = score.max(1)
        flips = (negative.long() << bit).sum(1)
        codes = candidate_codes[index] ^ flips
        # |x - c - shift|² = |target|² - 2 score.
        found.append((target.square().sum(1) - 2 * best, codes ^ (1 if shift < 0 else 0)))
    (up, up_codes), (down, down_codes) = found
    return torch.where(down < up, down_codes, up_codes)


@cache
def e81b_codewords() -> Tensor:
    """`[256, 8]` float32: the origin, the roots of E8, and 15 vectors ±2 on the axes."""
    integers = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * DIMENSION)
    halves = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * DIMENSION)
    lattice = torch.cat([integers[integers.sum(1) % 2 == 0], halves[halves.sum(1) % 2 == 0]])
    roots = torch.unique(lattice[lattice.square().sum(1) == 2], dim=0)
    axes = torch.unique(torch.cat([2 * torch.eye(DIMENSION), -2 * torch.eye(DIMENSION)]), dim=0)
    axes = axes[axes[:, -1] != -2]
    return torch.cat([torch.zeros(1, DIMENSION), roots, axes])


def _nearest_e81b(x: Tensor) -> Tensor:
    words = e81b_codewords().to(x)
    return torch.addmm(-words.square().sum(1) / 2, x, words.T).argmax(1)


@dataclass(frozen=True)
class Codebook:
    """Codebooks applied in turn, each to what the ones before left over, magnified."""

    bits: int
    opt_scale: float
    """RMS at which Gaussian weights are rounded best."""
    parts: tuple[str, ...]
    """e8p (16 bits a code) or e81b (8 bits)."""
    residual_scale: float = 1.0
    """Magnification of what the first part leaves over."""

    def encode(self, x: Tensor) -> list[Tensor]:
        """`[V, 8]` ▸ int64 codes `[V]` per part; the nearest codeword of each part."""
        out, left = [], x
        for i, part in enumerate(self.parts):
            scaled = left if i == 0 else left * self.residual_scale
            search = _nearest_e8p if part == "e8p" else _nearest_e81b
            codes = torch.cat([search(scaled[i : i + CHUNK]) for i in range(0, len(x), CHUNK)])
            out.append(codes)
            left = left - self.part(i, codes).to(x)
        return out

    def words(self, i: int) -> Tensor:
        """All codewords of part i, float32."""
        return e8p_codewords() if self.parts[i] == "e8p" else e81b_codewords()

    def part(self, i: int, codes: Tensor) -> Tensor:
        """Codes `[...]` ▸ what part i contributes `[..., 8]`, float32."""
        words = self.words(i).to(codes.device)[codes]
        return words if i == 0 else words / self.residual_scale

    def decode(self, codes: list[Tensor]) -> Tensor:
        """Codes `[...]` per part ▸ `[..., 8]` float32."""
        total = self.part(0, codes[0])
        for i in range(1, len(codes)):
            total = total + self.part(i, codes[i])
        return total


CODEBOOKS = {
    2: Codebook(2, 1.03, ("e8p",)),
    3: Codebook(3, 0.98, ("e8p", "e81b"), 2.04),
    4: Codebook(4, 1.03, ("e8p", "e8p"), 3.45),
}
"""By bits a weight."""
