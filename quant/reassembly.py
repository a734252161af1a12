"""Channel reassembly (QLLM, Liu et al. 2023, arXiv 2310.08041, section 4.1): outlier channels of a linear's input are split, others merged.

    disassembly   channel j ▸ T_j copies of x_j / T_j, T_j = ceil(max |x_j| / θ); its weight column is repeated (function-preserving)
    assembly      r = Σ (T_j - 1) pairs (source, destination) of the widened input, so that the width returns to C:
                  a channel becomes the mean of its members, its weight column their sum (an approximation)

Shapes: inputs `[..., C]`, weights `[N, C]`, distances `[sources, destinations]`. Widened channels are ordered by channel,
copies next to each other. Sources are the even channels of what is matched, destinations the odd ones (Bolya et al. 2022,
arXiv 2210.09461); several sources may share a destination.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(inputs `[T, a]` and `[T, b]`, weights `[N, a]` and `[N, b]`) ▸ `[a, b]`."""

MOST_COPIES = 255
"""Of one channel: the count is stored in a byte."""
BLOCK = 1024
"""Rows of the distances that are in float64 at a time."""


def copies(peaks: Tensor, threshold: float) -> Tensor:
    """T `[C]` int64 of largest magnitudes `[C]`: ceil(peak / threshold), one at least."""
    return torch.ceil(peaks / threshold).to(torch.int64).clamp(min=1)


@dataclass(frozen=True, eq=False)
class Reassembly:
    """Of one input of C channels."""

    splits: Tensor
    """T `[C]` uint8, at least 1."""
    sources: Tensor
    """`[r]` int32: widened channels that are merged into others; each at most once, and none of them a destination."""
    destinations: Tensor
    """`[r]` int32."""

    def __post_init__(self) -> None:
        added, wide = self.added, self.owner.numel()
        pairs = (self.sources, self.destinations)
        if any(p.numel() != added for p in pairs):
            raise ValueError(
                f"{added} channels were added by splitting, but {self.sources.numel()} pairs are merged; give one pair for each"
            )
        inside = all(bool(((p >= 0) & (p < wide)).all()) for p in pairs)
        if not inside or len(set(self.sources.tolist())) != added or bool(torch.isin(self.sources, self.destinations).any()):
            raise ValueError(f"sources and destinations must be different channels below {wide}, every source once")

    @property
    def added(self) -> int:
        return int(self.splits.long().sum()) - self.splits.numel()

    @cached_property
    def owner(self) -> Tensor:
        """`[C + r]`: the channel that a widened one is a copy of."""
        t = self.splits.long()
        return torch.arange(t.numel(), device=t.device).repeat_interleave(t)

    @cached_property
    def kept(self) -> Tensor:
        """`[C]`: the widened channels that remain, in order."""
        remains = torch.ones(self.owner.numel(), dtype=torch.bool, device=self.owner.device)
        remains[self.sources.long()] = False
        return remains.nonzero()[:, 0]

    @cached_property
    def rounds(self) -> list[tuple[Tensor, Tensor]]:
        """(source, position of its destination among `kept`), such that no destination comes twice in one round: sums then have one
        order on every device."""
        place = torch.full((self.owner.numel(),), -1, device=self.owner.device)
        place[self.kept] = torch.arange(self.kept.numel(), device=place.device)
        into = place[self.destinations.long()]
        nth = (torch.tril(into[:, None] == into[None, :], -1)).sum(1)
        return [(self.sources.long()[nth == n], into[nth == n]) for n in range(int(nth.max()) + 1 if nth.numel() else 0)]

    @cached_property
    def members(self) -> Tensor:
        """`[C]`: widened channels behind each that remains."""
        out = torch.ones(self.kept.numel(), dtype=torch.int64, device=self.owner.device)
        for _, into in self.rounds:
            out[into] += 1
        return out

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All that `apply` keeps in memory, which is more than what is stored."""
        rounds = (t for pair in self.rounds for t in pair)
        return (self.splits, self.sources, self.destinations, self.owner, self.kept, self.members, *rounds)

    def disassemble(self, x: Tensor) -> Tensor:
        """`[..., C]` ▸ `[..., C + r]`: the copies x_j / T_j."""
        return (x / self.splits.to(x))[..., self.owner]

    def widen(self, weight: Tensor) -> Tensor:
        """`[N, C]` ▸ `[N, C + r]` with repeated columns."""
        return weight[:, self.owner]

    def apply(self, x: Tensor) -> Tensor:
        """The linear's new input `[..., C]`, computed in float32 at least and in the type of x. Differentiable."""
        wide = self.disassemble(x.to(torch.promote_types(x.dtype, torch.float32)))
        return (self._merged(wide) / self.members.to(wide)).to(x.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight `[N, C]` that reads `apply(x)`."""
        return self._merged(self.widen(weight))

    def read_as(self, weight: Tensor) -> Tensor:
        """The weight `[N, C]` that makes of x what `weight` makes of `apply(x)`."""
        shared = weight / self.members.to(weight)
        wide = weight.new_zeros(weight.shape[0], self.owner.numel())
        wide[:, self.kept] = shared
        for sources, into in self.rounds:
            wide[:, sources] = shared[:, into]
        out = weight.new_zeros(weight.shape[0], self.splits.numel())
        return out.index_add(1, self.owner, wide) / self.splits.to(out)

    def _merged(self, wide: Tensor) -> Tensor:
        out = wide[..., self.kept]
        for sources, into in self.rounds:
            out.index_add_(-1, into, wide[..., sources])
        return out

    def pack(self) -> dict[str, Tensor]:
        """What is stored: C bytes, and two integers of 32 bits for every pair."""
        return {"splits": self.splits, "sources": self.sources, "destinations": self.destinations}

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor]) -> Reassembly:
        return Reassembly(tensors["splits"], tensors["sources"], tensors["destinations"])

    def to(self, device: torch.device) -> Reassembly:
        return Reassembly(*(t.to(device) for t in (self.splits, self.sources, self.destinations)))


# --- which channels are merged ------------------------------------------------------------------------------------


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||² of columns, `[a, b]`."""
    return (x.square().sum(0)[:, None] + y.square().sum(0)[None, :] - 2 * (x.T @ y)).clamp(min=0)


def signed_sums(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The reference code's: ((Σ_o w_oi + Σ_o w_oj) ||x_i - x_j||)². Sums are signed and may cancel."""
    return (w.sum(0)[:, None] + v.sum(0)[None, :]).square() * _apart(x, y)


def averaging_error(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Eq. 5: ||x_i (w_i - w_j) / 2 + x_j (w_j - w_i) / 2||², the output error of averaging; it is ||x_i - x_j||² ||w_i - w_j||² / 4."""
    return _apart(x, y) * _apart(w, v) / 4


DISTANCES: dict[str, Distance] = {"reference": signed_sums, "paper": averaging_error}


def distances(x: Tensor, weight: Tensor, distance: Distance) -> Tensor:
    """`[C, C]` float32 (float64 for float64 inputs) between the channels of x `[T, C]` and weight `[N, C]`, computed in float64."""
    kept = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.double(), weight.double()
    blocks = range(0, x.shape[1], BLOCK)
    return torch.cat([distance(x[:, b : b + BLOCK], x, weight[:, b : b + BLOCK], weight).to(kept) for b in blocks])


def assemble(apart: Tensor, splits: Tensor, *, widened: bool) -> Reassembly | None:
    """The r nearest pairs are merged, where channels are split into `splits` `[C]` int64; None where too few can be merged.

    apart `[C, C]`: `distances`. Split channels are not merged. Every source takes its nearest destination; the nearest pairs win,
    of equals the first. widened: sources are the even of the widened channels, otherwise of the channels as they were."""
    if int(splits.max()) > MOST_COPIES:
        return None
    count = int(splits.sum()) - splits.numel()
    first = splits.cumsum(0) - splits
    parity = (first if widened else torch.arange(splits.numel(), device=splits.device)) % 2
    even, odd = (((parity == p) & (splits == 1)).nonzero()[:, 0] for p in (0, 1))
    if even.numel() < count or not odd.numel():
        return None
    least, nearest = apart[even][:, odd].min(1)
    best = torch.argsort(least, stable=True)[:count]
    pairs = (first[even[best]], first[odd[nearest[best]]])
    return Reassembly(splits.to(torch.uint8), pairs[0].to(torch.int32), pairs[1].to(torch.int32))
