"""A figure of a benchmark on a GPU, and the clock that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

COLD, REPLAYS = 512e6, 20
"""Bytes that are read before an input's turn comes again; replays."""


@dataclass
class Row:
    name: str
    error: float
    allowed: float
    ours_us: float | None = None
    peers_us: dict[str, float] = field(default_factory=dict)
    read: int = 0
    """Bytes that a call has to read."""
    goal: str = ""

    def line(self, read_gbs: float | None) -> str:
        said = f"{self.name}: error {self.error:.1e} (allowed {self.allowed:.1e})"
        if self.ours_us is None:
            return said
        said += f", {self.ours_us:.1f} us"
        if self.read:
            speed = self.read / self.ours_us / 1e3
            said += f", {speed:.0f} GB/s" + (f" ({100 * speed / read_gbs:.0f} % of what can be read)" if read_gbs else "")
        said += "".join(f", {name} {us:.1f} us" for name, us in self.peers_us.items())
        return said + (f"; goal {self.goal}" if self.goal else "")


class Bench:
    """dry: small shapes on the CPU, nothing timed. alone: without other packages."""

    def __init__(self, dry: bool, alone: bool = False) -> None:
        self.dry, self.alone = dry, alone or dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.backend = "triton"
        self.read_gbs: float | None = None

    def size(self, real: int, small: int) -> int:
        return small if self.dry else real

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(sum(shape)), device=self.device).to(dtype)

    def time(self, work: Callable[[int], object], copies: int = 1) -> float | None:
        """Microseconds of `work(i)`, i of `copies` inputs in turn."""
        if self.dry:
            work(0)
            return None
        calls = max(copies, 8)
        for i in range(3):
            work(i % copies)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                work(i % copies)
        return self._least(graph.replay) / calls

    def once(self, work: Callable[[], object]) -> float | None:
        """Microseconds of a call that no graph can hold."""
        if self.dry:
            work()
            return None
        return self._least(work)

    def _least(self, work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            best = min(best, 1e3 * start.elapsed_time(end))
        return best


def known(**times: float | None) -> dict[str, float]:
    return {name: t for name, t in times.items() if t is not None}


def beside_dense(b: Bench, x: Tensor, dense: Tensor) -> float | None:
    weights = [dense.clone() for _ in range(b.size(1 + int(COLD / dense.nbytes), 1))]
    return b.time(lambda i: linear(x, weights[i]), len(weights))
