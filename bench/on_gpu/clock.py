"""A figure of a benchmark on a GPU, its goal, and the clock that all of them share."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.copies import copied

COLD, REPLAYS = 512e6, 20
"""Bytes that are read before an input's turn comes again; replays."""
LONG_US, WARM_US, MOST_CALLS = 2e3, 5e4, 1 << 14
"""Of a replay at least, so that its start counts little; for how long the device works before it is timed: on an H200, right after weights
had been made, products of one row took longer than those of two, for reasons that were not found; calls of a replay that is long enough."""
MOST = 0.75
"""Share of a call's time from which on what would take it alone is said to limit the call."""


@dataclass
class Ceilings:
    """What the device can do, as measured by the piece `limits` of the same run; None and empty where that was not run."""

    read_gbs: float | None = None
    copy_gbs: float | None = None
    """Bytes read and bytes written both count."""
    launch_us: float | None = None
    """Of a kernel with nothing to do, one after another in a graph."""
    tflops: dict[str, float] = field(default_factory=dict)
    """Operands' type ▸ 10¹² operations a second of a large product."""
    cholesky_us: dict[int, float] = field(default_factory=dict)
    """Order ▸ microseconds of a float32 factorization."""


@dataclass(frozen=True)
class Goal:
    """A bound of a figure, and on which side of it the figure is to be."""

    bound: float
    of: str = "us"
    """us: microseconds · read, copy: share of the device's speed · speed: times that of the fastest of `over` · time: over the least of
    `over`."""
    over: tuple[str, ...] = ()
    """Names among a row's peers."""

    @property
    def at_most(self) -> bool:
        return self.of in ("us", "time")

    def figure(self, row: Row, ceilings: Ceilings) -> float | None:
        """None where the row, or what it is compared with, was not timed."""
        if row.ours_us is None:
            return None
        if self.of == "us":
            return row.ours_us
        if self.of in ("read", "copy"):
            most = ceilings.read_gbs if self.of == "read" else ceilings.copy_gbs
            return None if most is None else row.read / row.ours_us / 1e3 / most
        there = [row.peers_us[name] for name in self.over if name in row.peers_us]
        if not there:
            return None
        return min(there) / row.ours_us if self.of == "speed" else row.ours_us / min(there)

    def missed_by(self, row: Row, ceilings: Ceilings) -> float | None:
        """What lacks, as a share of the bound; 0 or less: the goal is met."""
        figure = self.figure(row, ceilings)
        if figure is None:
            return None
        return figure / self.bound - 1 if self.at_most else 1 - figure / self.bound

    def __str__(self) -> str:
        side = "at most" if self.at_most else "at least"
        if self.of == "us":
            return f"{side} {shown(self.bound)}"
        if self.of in ("read", "copy"):
            return f"{side} {100 * self.bound:g} % of {'what can be read' if self.of == 'read' else 'a copy'}"
        return f"{side} {self.bound:g} x the {self.of} of {' and '.join(self.over)}"


@dataclass
class Row:
    name: str
    error: float
    allowed: float
    ours_us: float | None = None
    peers_us: dict[str, float] = field(default_factory=dict)
    read: int = 0
    """Bytes that a call has to read (and write, where that is as much)."""
    goal: Goal | None = None
    work: dict[str, float] = field(default_factory=dict)
    """Operands' type ▸ operations of a call."""
    launches: int = 1
    more: dict[str, float] = field(default_factory=dict)
    """Other limits by name ▸ the least microseconds that they allow."""
    details: dict[str, Any] = field(default_factory=dict)
    """Of a run of many parts, for a file of results."""

    @property
    def right(self) -> bool:
        """False for an error that is NaN, too."""
        return self.error <= self.allowed

    def missed_by(self, ceilings: Ceilings) -> float | None:
        """None where there is no goal, nothing to judge it by, or the result is wrong."""
        return None if self.goal is None or not self.right else self.goal.missed_by(self, ceilings)

    def least(self, ceilings: Ceilings) -> dict[str, float]:
        """What may limit it ▸ the share of its time that this would take alone at the device's own speed."""
        if self.ours_us is None:
            return {}
        found: dict[str, float] = {}
        if self.read and ceilings.read_gbs:
            found["bytes"] = self.read / ceilings.read_gbs / 1e3
        for kind, count in self.work.items():
            if kind in ceilings.tflops:
                found[f"{kind} operations"] = count / ceilings.tflops[kind] / 1e6
        if self.launches and ceilings.launch_us:
            found["launches"] = self.launches * ceilings.launch_us
        return {name: us / self.ours_us for name, us in (found | self.more).items()}

    def line(self, ceilings: Ceilings) -> str:
        said = f"{self.name}: error {self.error:.1e} (allowed {self.allowed:.1e})" + ("" if self.right else "  WRONG")
        if self.ours_us is None:
            return said
        said += f", {shown(self.ours_us)}"
        if self.read:
            speed, most = self.read / self.ours_us / 1e3, ceilings.read_gbs
            said += f", {speed:.0f} GB/s" + (f" ({100 * speed / most:.0f} % of what can be read)" if most else "")
        said += "".join(f", {name} {shown(us)}" for name, us in self.peers_us.items())
        return said + ("" if self.goal is None else f"; goal {self.goal}: {self._judged(self.goal, ceilings)}")

    def _judged(self, goal: Goal, ceilings: Ceilings) -> str:
        if not self.right:
            return "not judged, the result is wrong"
        missed = self.missed_by(ceilings)
        absent = [name for name in goal.over if name not in self.peers_us]
        without = f" ({', '.join(absent)} not measured)" if absent else ""
        if missed is None:
            return f"not judged, nothing to compare with{without}"
        if missed <= 0:
            return f"met{without}"
        least = self.least(ceilings)
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in least.items())
        name = max(least, key=lambda n: least[n], default="")
        # Where no limit of the device takes most of the time, something else does: instructions, waiting, an uneven last wave.
        why = f"{name} limit it" if name and least[name] >= MOST else "latency or instructions, none of these, limit it"
        return f"missed by {100 * missed:.{0 if missed >= 0.1 else 1}f} %{without}; {why if least else 'no limits were measured'}" + (
            f" (of its time need {shares})" if shares else ""
        )

    def told(self, ceilings: Ceilings) -> dict[str, Any]:
        """For a file of results."""
        missed = self.missed_by(ceilings)
        return {
            "name": self.name,
            "error": self.error,
            "allowed": self.allowed,
            "ours_us": self.ours_us,
            "peers_us": self.peers_us,
            "read": self.read,
            "goal": "" if self.goal is None else str(self.goal),
            "missed_by": None if missed is None else round(missed, 4),
            "limits": {name: round(share, 4) for name, share in self.least(ceilings).items()},
        } | ({"details": self.details} if self.details else {})


class Bench:
    """dry: small shapes on the CPU, nothing timed. alone: without other packages. Raises RuntimeError where a dry one alone can run."""

    def __init__(self, dry: bool, alone: bool = False) -> None:
        # As stages have it: cuBLAS reads it when its first handle is made, which may be long before a stage runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if not dry and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device; `TRITON_INTERPRET=1 python -m bench.gpu --dry` checks the kernels without one")
        self.dry, self.alone = dry, alone or dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.backend = "triton"
        self.ceilings = Ceilings()
        self.folder: Path | None = None
        """Where models are kept from run to run; a folder that is removed at the end where it is None."""
        self.layers: int | None = None
        """Of whole models; as the piece has it where it is None."""
        self.longest: float | None = None
        """Seconds that the timed run of a whole model may take: it is cut to as many layers."""

    def size(self, real: int, small: int) -> int:
        return small if self.dry else real

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(sum(shape)), device=self.device).to(dtype)

    def time(self, work: Callable[[int], object], copies: int = 1) -> float | None:
        """Microseconds of `work(i)`, i of `copies` inputs in turn."""
        if self.dry:
            work(0)
            return None
        calls = copies * math.ceil(8 / copies)
        for i in range(3):
            work(i % copies)
        replay = captured(work, copies, calls)
        while (took := self._least(replay)) < LONG_US and calls < MOST_CALLS:
            calls *= math.ceil(LONG_US / max(1.0, took))
            replay = captured(work, copies, calls)
        return took / calls

    def once(self, work: Callable[[], object]) -> float | None:
        """Microseconds of a call that no graph can hold."""
        if self.dry:
            work()
            return None
        return self._least(work)

    def _least(self, work: Callable[[], object]) -> float:
        work()  # the first may compile, and leave the device idle; a graph's goes to the device with it
        busy = 0.0
        while busy < WARM_US:
            busy += max(1.0, elapsed_us(work))
        return min(elapsed_us(work) for _ in range(REPLAYS))


def going_on(rows: Iterable[Callable[[], Row]]) -> Iterator[Row]:
    """One that fails is told, and keeps no other from being measured. Raises RuntimeError after the last where any did."""
    failed = 0
    for row in rows:
        try:
            made = row()
        except Exception:
            traceback.print_exc()
            failed += 1
        else:
            yield made
    if failed:
        raise RuntimeError(f"{failed} of the piece's rows failed, for the reasons above")


def captured(work: Callable[[int], object], copies: int, calls: int) -> Callable[[], object]:
    """Replays so many calls of `work(i)`, i of `copies` inputs in turn."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            work(i % copies)
    return graph.replay


def elapsed_us(work: Callable[[], object]) -> float:
    """On the device, what it waits for the host counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(1e3 * start.elapsed_time(end))


def shown(us: float) -> str:
    """With a unit in which it is short."""
    return f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us:.1f} us"


def spread(n: int, count: int = 128) -> slice:
    """Some `count` of n rows to compare, fewer than twice as many, from everywhere. Odd steps: rows of tiles are a power of two, and of
    every place in a tile one is compared."""
    return slice(None, None, max(1, n // count) | 1)


def worst(*errors: float) -> float:
    """The largest; NaN where one is, which nothing allows and `max` may leave out."""
    return max(errors, key=lambda error: (error != error, error))


def known(**times: float | None) -> dict[str, float]:
    return {name: t for name, t in times.items() if t is not None}


def cold_copies(b: Bench, packed: Any) -> list[Any]:
    """As many as no cache holds, the original first."""
    return [packed, *(copied(packed) for _ in range(b.size(int(COLD / packed.bytes), 0)))]


def beside_dense(b: Bench, x: Tensor, dense: Tensor) -> float | None:
    weights = [dense.clone() for _ in range(b.size(1 + int(COLD / dense.nbytes), 1))]
    return b.time(lambda i: linear(x, weights[i]), len(weights))
