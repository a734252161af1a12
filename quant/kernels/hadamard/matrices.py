"""Hadamard matrices: entries ±1, H Hᵀ = n I. Orders here are m · 2^k with m one of `SMALL`: the Kronecker product of a small matrix
(m, the slow index) and Sylvester's. The small ones are computed, not tabulated:
  12, 20, 60, 108, 140    Paley's first construction on the quadratic residues of the primes 11, 19, 59, 107, 139
  40                      Sylvester's doubling of 20, the doubling being the slow index
  28, 36, 148             Paley's second construction on the primes 13, 17, 73
  52, 172                 Williamson's array of four symmetric circulants of order 13 and 43
  156                     Goethals-Seidel array of T-matrices of order 3 and the Williamson matrices of order 13 (Cooper and Wallis)
Those of order 12, 20, 28 and 40 are, sign by sign, the ones that QuaRot multiplies with; so is the order of the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def _legendre(q: int) -> Tensor:
    """chi `[q]` of a prime q: 1 on squares, -1 on the others, 0 at 0."""
    chi = torch.full((q,), -1)
    chi[[i * i % q for i in range(1, q)]] = 1
    chi[0] = 0
    return chi


def _circulant(first: Tensor) -> Tensor:
    """Row i is `first` `[q]` shifted right by i."""
    q = first.numel()
    i = torch.arange(q)
    return first[(i[None, :] - i[:, None]) % q]


def _paley_1(q: int) -> Tensor:
    """Order q + 1 for a prime q of the form 4 t + 3: I + S, S skew with the residues' matrix inside."""
    h = torch.ones(q + 1, q + 1, dtype=torch.long)
    h[0, 1:] = -1
    h[1:, 1:] = torch.eye(q, dtype=torch.long) - _circulant(_legendre(q))
    return h


def _paley_2(q: int) -> Tensor:
    """Order 2 q + 2 for a prime q of the form 4 t + 1: [[C + I, C - I], [C - I, -C - I]] of the conference matrix C."""
    c = torch.ones(q + 1, q + 1, dtype=torch.long)
    c[0, 0] = 0
    c[1:, 1:] = _circulant(_legendre(q))
    i = torch.eye(q + 1, dtype=torch.long)
    return torch.cat([torch.cat([c + i, c - i], 1), torch.cat([c - i, -c - i], 1)])


WILLIAMSON = {
    # Order ▸ generator and size of a group of multipliers, and for each of the four circulants which of its orbits (up to sign) are -1,
    # one bit an orbit, in the order of their smallest members. Found by exhaustive search; the first solution is taken.
    13: (1, 1, (3, 20, 25, 49)),
    43: (36, 3, (7, 46, 52, 98)),
}


def _williamson_circulants(q: int) -> list[Tensor]:
    """Four symmetric circulants of order q with A² + B² + C² + D² = 4 q I."""
    generator, size, masks = WILLIAMSON[q]
    group = [pow(generator, k, q) for k in range(size)]
    orbits: list[list[int]] = []
    for u in range(1, q):
        if not any(u in o for o in orbits):
            orbits.append([s * u * h % q for h in group for s in (1, -1)])
    found = []
    for mask in masks:
        first = torch.ones(q, dtype=torch.long)
        for i, orbit in enumerate(orbits):
            if mask >> i & 1:
                first[orbit] = -1
        found.append(_circulant(first))
    return found


def _williamson(q: int) -> Tensor:
    a, b, c, d = _williamson_circulants(q)
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(r, 1) for r in rows])


def _goethals_seidel(q: int) -> Tensor:
    """Order 12 q: Williamson matrices of order q spread by the T-matrices of order 3 (the powers of the shift)."""
    a, b, c, d = _williamson_circulants(q)
    t1, t2, t3 = (_circulant(row) for row in torch.eye(3, dtype=torch.long))
    w = [
        torch.kron(t1, a) + torch.kron(t2, b) + torch.kron(t3, c),
        -torch.kron(t1, b) + torch.kron(t2, a) + torch.kron(t3, d),
        -torch.kron(t1, c) - torch.kron(t2, d) + torch.kron(t3, a),
        -torch.kron(t1, d) + torch.kron(t2, c) - torch.kron(t3, b),
    ]
    r = torch.kron(torch.eye(3, dtype=torch.long).flip(0), torch.eye(q, dtype=torch.long).flip(0))
    a, b, c, d = w
    rows = [[a, b @ r, c @ r, d @ r], [-b @ r, a, d.T @ r, -c.T @ r], [-c @ r, -d.T @ r, a, b.T @ r], [-d @ r, c.T @ r, -b.T @ r, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _doubled(h: Tensor) -> Tensor:
    return torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])


SMALL: dict[int, Callable[[], Tensor]] = {
    12: lambda: _paley_1(11),
    20: lambda: _paley_1(19),
    28: lambda: _paley_2(13),
    36: lambda: _paley_2(17),
    40: lambda: _doubled(_paley_1(19)),
    52: lambda: _williamson(13),
    60: lambda: _paley_1(59),
    108: lambda: _paley_1(107),
    140: lambda: _paley_1(139),
    148: lambda: _paley_2(73),
    156: lambda: _goethals_seidel(13),
    172: lambda: _williamson(43),
}
"""Order ▸ the matrix by which column vectors are multiplied, entries ±1."""


def small_factor(n: int) -> int | None:
    """m of n = m · 2^k: 1 for powers of two, the largest that fits else; None where there is no matrix of order n."""
    if n < 1:
        raise ValueError(f"a Hadamard matrix of order {n}; the order is at least 1")
    fitting = [m for m in (1, *SMALL) if n % m == 0 and (n // m).bit_count() == 1]
    return max(fitting, default=None)


def hadamard_block(n: int) -> int:
    """The order to transform n values with: n itself where a matrix of that order exists, else the largest power of two that divides n
    (the values are then transformed in n / block blocks)."""
    return n if small_factor(n) is not None else n & -n


def factors(n: int) -> tuple[int, int]:
    """(m, 2^k). Raises ValueError where there is no matrix of order n."""
    m = small_factor(n)
    if m is None:
        raise ValueError(
            f"no Hadamard matrix of order {n} is known here; orders are 2^k and 2^k times {', '.join(map(str, SMALL))}; "
            f"transform blocks of {hadamard_block(n)} values instead"
        )
    return m, n // m


@cache
def small(m: int, transpose: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[m, m]` of ±1: what multiplies columns of m values in x ▸ x H (x Hᵀ with `transpose`)."""
    # It outlives the caller: what is made in inference mode could not be differentiated through later.
    with torch.inference_mode(False):
        # How it lies in memory is kept: a library's product may depend on that in its last bits.
        made = SMALL[m]().T.to(device, dtype).contiguous()
        return made if transpose else made.T
