"""k-means of columns: `C` independent one-dimensional problems of `N` values and `k` centres each (CLAQ's codebooks).

Every backend has
- `kmeans(columns [C, N], k, start, weights=None) ▸ centres [C, k]`, ascending, of the columns' float type: a local minimum of the sum of
  squared distances, by Lloyd's steps. With k or fewer distinct values the centres are these values, and the last one is repeated.
  `weights`, 0 or more, `[N]` or `[C, N]`: of the squared distances, as the diagonal of the Hessian is for a row of a linear (Kim et al.
  2023, arXiv 2306.07629); in CLAQ all values of a column have one. A cluster that weighs nothing keeps its centre.
- `nearest(columns [C, N], centres [C, k]) ▸ codes` uint8 `[C, N]`; a value halfway between two centres goes to the lower.

start
- `partition`: candidate cuts that lie dense where the square root of the density is large, the best k runs between them by dynamic
  programming, then steps until no value changes its cluster. Close to the exact optimum.
- `plus_plus`: what scikit-learn's `KMeans(k, n_init=1, random_state=10)` does: greedy k-means++ (Arthur & Vassilvitskii 2007) with
  2 + ln k candidates per centre and NumPy's stream of that seed, then steps until the centres move less than 1e-4 of the variance.
  Weights count in all draws, and in the variance.

Everything is deterministic. `cpu` and `torch` work on sorted values and prefix sums in float64 and give equal bits; `cuda` takes the same
steps with sums in another order, where a cluster that weighs less than 2^-44 of the column weighs nothing; `reference` is plus_plus the
plain way.
"""

from __future__ import annotations

import math
from functools import cache
from random import Random

import torch
from torch import Tensor

STARTS = ("partition", "plus_plus")
MOST_CENTRES = 256
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
"""Of the libraries' entries."""
STEPS = 300
"""Lloyd's steps at most, as in scikit-learn."""
TOLERANCE = 1e-4
"""Of the variance: squared moves of the centres at which plus_plus stops."""


def bins(k: int) -> int:
    """Candidate runs of values from which the partition is made. Beyond 32 centres they are the start themselves: there are so many
    that dynamic programming costs more than it saves."""
    return 64 + 4 * k if k <= 32 else k


def check(k: int, start: str) -> None:
    """Raises ValueError for what no backend knows."""
    if not 1 <= k <= MOST_CENTRES:
        raise ValueError(f"k={k} centres; give 1 to {MOST_CENTRES}, what a code of 8 bits can name")
    if start not in STARTS:
        raise ValueError(f"start={start!r} is unknown; choose {' or '.join(STARTS)}")


def known(columns: Tensor) -> Tensor:
    """Of a type that the libraries have (`SUFFIX`), row after row."""
    return (columns if columns.dtype in SUFFIX else columns.float()).detach().contiguous()


def weights_of(columns: Tensor, weights: Tensor) -> Tensor:
    """float64 `[C, N]`, a view where that does. Raises ValueError for another shape."""
    if weights.shape not in (columns.shape, columns.shape[1:]):
        raise ValueError(f"weights have shape {tuple(weights.shape)}; give {tuple(columns.shape)}, or {tuple(columns.shape[1:])} for all")
    return weights.detach().to(columns.device, torch.float64).expand(columns.shape)


def trials(k: int) -> int:
    """Candidates per centre of greedy k-means++."""
    return 2 + int(math.log(k))


def numpy_stream(seed: int) -> Random:
    """Python's generator in the state that `numpy.random.RandomState(seed)` starts from: equal uniform numbers in [0, 1).

    Both are the same Mersenne twister; NumPy seeds it by `init_genrand` (Matsumoto and Nishimura 1998)."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) % 2**32)
    stream = Random()
    stream.setstate((3, (*state, 624), None))
    return stream


@cache
def draws(k: int, seed: int = 10) -> tuple[float, ...]:
    """The uniform numbers that k-means++ takes: one for the first centre, then `trials(k)` for each other one."""
    stream = numpy_stream(seed)
    return tuple(stream.random() for _ in range(1 + (k - 1) * trials(k)))


_DRAWS: dict[tuple[int, torch.device], Tensor] = {}


def draws_on(k: int, device: torch.device) -> Tensor:
    """`draws(k)` on a device, float64. The same for all threads, and never freed: launches are given its address alone. (Two threads that
    miss a `functools.cache` at once have a tensor each, of which the cache keeps the later.)"""
    found = _DRAWS.get((k, device))
    return _DRAWS.setdefault((k, device), torch.tensor(draws(k), dtype=torch.float64, device=device)) if found is None else found


def unfit(centres: Tensor, stored: Tensor) -> Tensor:
    """bool `[C]`: centres `[C, k]`, ascending, that the type of `stored` does not hold closely enough. Values may be off by a 256th of
    their range, equal ones by a 1024th of their size."""
    width = centres[:, -1:] - centres[:, :1]
    allowed = torch.where(width > 0, width / 256, centres.abs().amax(1, keepdim=True) / 1024)
    return ~((stored.to(centres) - centres).abs() <= allowed).all(1)
