"""Random orthogonal matrices that are cheap to apply (QuIP, arXiv 2307.13304, section 4.1): a permutation, two factors, a permutation.

Size n = p q with p and q as equal as n allows. A vector is permuted and laid out as p x q; every column is multiplied by an
orthogonal p x p matrix of its own, then every row by a q x q one, each uniform (Haar); the result is permuted again. n (p + q)
products instead of n².

All of it is drawn from one seed on the CPU, in float64, and rounded to float32 there: the same on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def balanced_factors(n: int) -> tuple[int, int]:
    """(p, q), p q = n, p <= q, p as large as possible; (1, n) for primes."""
    p = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return p, n // p


def random_orthogonal(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`[count, size, size]` float64, uniform over orthogonal matrices: QR of normal numbers with a positive diagonal of R."""
    q: Tensor
    r: Tensor
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))
    sign = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    return q * sign[:, None, :]


@dataclass(frozen=True)
class Butterfly:
    """An orthogonal matrix V `[n, n]`, orthogonal to 1e-7: its entries are products of float32 numbers."""

    first: Tensor
    """`[q, p, p]` float64."""
    second: Tensor
    """`[p, q, q]` float64."""
    enter: Tensor
    leave: Tensor
    """Permutations `[n]`."""

    @staticmethod
    def draw(n: int, generator: torch.Generator) -> Butterfly:
        p, q = balanced_factors(n)
        first = random_orthogonal(q, p, generator).float().double()
        second = random_orthogonal(p, q, generator).float().double()
        return Butterfly(first, second, torch.randperm(n, generator=generator), torch.randperm(n, generator=generator))

    def apply(self, x: Tensor) -> Tensor:
        """float64 `[..., n]` ▸ x Vᵀ: every row multiplied by V."""
        p, q = self.second.shape[:2]
        y = x.reshape(-1, p * q)[:, self.enter].view(-1, p, q)
        y = torch.matmul(self.first, y.permute(2, 1, 0))  # [q, p, rows]
        y = torch.matmul(self.second, y.permute(1, 0, 2))  # [p, q, rows]
        return y.permute(2, 0, 1).reshape(-1, p * q)[:, self.leave].view(x.shape)

    def undo(self, x: Tensor) -> Tensor:
        """float64 `[..., n]` ▸ x V, the inverse of `apply`."""
        p, q = self.second.shape[:2]
        y = torch.empty_like(x.reshape(-1, p * q))
        y[:, self.leave] = x.reshape(-1, p * q)
        y = torch.matmul(self.second.transpose(1, 2), y.view(-1, p, q).permute(1, 2, 0))  # [p, q, rows]
        y = torch.matmul(self.first.transpose(1, 2), y.permute(1, 0, 2))  # [q, p, rows]
        out = torch.empty_like(x.reshape(-1, p * q))
        out[:, self.enter] = y.permute(2, 1, 0).reshape(-1, p * q)
        return out.view(x.shape)


def butterflies(n: int, k: int, seed: int) -> tuple[Butterfly, Butterfly]:
    """U `[N, N]` and V `[K, K]` of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return Butterfly.draw(n, generator), Butterfly.draw(k, generator)
