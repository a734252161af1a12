"""Other packages' kernels, for `bench.gpu`: each peer's time beside ours, by the same clock, over inputs that no cache holds.

A peer is there where its package can be imported; nothing depends on one, and what the packages depend on need not be there:
`pip install --no-deps humming-kernels gemlite bitsandbytes llmcompressor optimum-quanto`. What a peer returns is compared with float64
arithmetic on its own dequantized weight. Peers run in a process of their own, which is started again without the one that ended it:
whatever a peer does, it costs a line that says why it was not run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.on_gpu.peer_kernels import PEERS, Case, Peer
from quant.kernels.native import apart

if TYPE_CHECKING:
    from bench.on_gpu.clock import Bench

SECONDS = 150
"""For all peers of a kind together; those not reached by then are not run."""


@dataclass
class Figure:
    peer: str
    case: Case | None = None
    """None: all of its cases."""
    us: float | None = None
    error: float = 0
    allowed: float = 0
    read: int = 0
    seconds: float = 0
    """Spent on this, preparation included."""
    reason: str = ""
    """Why it was not run."""

    @property
    def right(self) -> bool:
        return not self.reason and self.error <= self.allowed

    def line(self) -> str:
        said = f"   peer {self.peer}" + (f", {self.case}" if self.case else "")
        if self.reason:
            return f"{said}: not run: {self.reason}"
        if self.case is None:
            return f"{said}: prepared, {self.seconds:.1f} s"
        said += f": error {self.error:.1e} (allowed {self.allowed:.1e})" + ("" if self.right else "  WRONG, not shown beside ours")
        if self.us is not None:
            said += f", {self.us:.1f} us" + (f", {self.read / self.us / 1e3:.0f} GB/s" if self.read else "")
        return f"{said}, {self.seconds:.1f} s"


def why(error: BaseException) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def figures(b: Bench, name: str, peer: Peer) -> Iterator[Figure]:
    """Of one peer. Raises nothing that is an Exception."""
    began = time.perf_counter()
    try:
        make = peer.start(b, list(peer.cases))
    except Exception as error:
        yield Figure(name, reason=why(error), seconds=time.perf_counter() - began)
        return
    yield Figure(name, seconds=time.perf_counter() - began)
    for case in peer.cases:
        start = time.perf_counter()
        if start - began > peer.seconds:
            yield Figure(name, reason=f"{peer.seconds:.0f} s were spent before {case}")
            return
        try:
            ready = make(case)
            wrong = ready.error(ready.run(0))
            took = b.time(ready.run, ready.copies)
            if took is not None and ready.beside is not None:
                took -= b.time(ready.beside) or 0
            figure = Figure(name, case, took, wrong, ready.allowed, ready.read)
            del ready
        except Exception as problem:
            figure = Figure(name, case, reason=why(problem))
        figure.seconds = time.perf_counter() - start
        yield figure


def supervised(names: Iterable[str], command: Callable[[list[str], Path], list[str]], seconds: float) -> Iterator[Figure]:
    """What processes tell that `command(peers, file)` starts, and for a peer that ended its process, or took too long, that it did."""
    left, end = list(names), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while left:
            out, log = Path(folder) / "figures", Path(folder) / "log"
            out.write_text("")
            code = run_apart(command(left, out), log, max(1, end - time.monotonic()))
            reason = f"{seconds:.0f} s for all peers were spent" if code is None else f"its process ended with {code}"
            for line in out.read_text().splitlines():
                told = json.loads(line)
                if "done" in told:
                    left.remove(told["done"])
                else:
                    case = told.pop("case")
                    yield Figure(case=Case(**case) if case else None, **told)
            if left:
                yield Figure(left.pop(0), reason=": ".join([reason, *last_said(log)]))


def run_apart(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit status of a command in a process group of its own, its output in `log`; None where it took too long and was ended."""
    try:
        with log.open("w") as file, apart(command, stdout=file, stderr=subprocess.STDOUT) as process:
            return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def last_said(log: Path) -> list[str]:
    """Its last line, shortened; none where it said nothing."""
    said = [" ".join(line.split()) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return [line[:200] for line in said[-1:]]


@cache
def found(kind: str) -> tuple[Figure, ...]:
    """Measures all peers of a kind, once, and prints what it finds."""
    torch.cuda.empty_cache()
    began = time.perf_counter()
    here = [sys.executable, "-m", "bench.on_gpu.peers"]
    made: list[Figure] = []
    for figure in supervised([n for n, p in PEERS.items() if p.kind == kind], lambda left, out: [*here, str(out), *left], SECONDS):
        print(figure.line(), flush=True)
        made.append(figure)
    spent = {name: sum(f.seconds for f in made if f.peer == name) for name in dict.fromkeys(f.peer for f in made)}
    each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items())
    print(f"   peers of {kind}: {time.perf_counter() - began:.1f} s ({each})", flush=True)
    return tuple(made)


def times(b: Bench, kind: str, n: int, k: int, m: int, bits: int) -> dict[str, float]:
    """Peer ▸ microseconds, of those that were right. None where ours are timed alone."""
    if b.alone:
        return {}
    return {f.peer: f.us for f in found(kind) if f.case == Case(n, k, m, bits) and f.right and f.us is not None}


def main(out: str, *names: str) -> int:
    from bench.on_gpu.clock import Bench

    b = Bench(dry=False)
    with Path(out).open("a", buffering=1) as file:
        for name in names:
            for figure in figures(b, name, PEERS[name]):
                file.write(json.dumps(asdict(figure)) + "\n")
            if torch.cuda.is_available():  # an error that stays with the process is this peer's, not the next one's
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            file.write(json.dumps({"done": name}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
