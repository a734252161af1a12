"""What a worker process keeps of calibrate artifacts between stages: statistics as they were read, and the factors of Hessians made
from them. Both serve every further method, bit-width and group size with propagation=original; statistics of already quantized blocks
are a stage's own and never come here.

Nothing kept changes a result: statistics are found by the digest of their file, factors by the file, the site, the damping and a digest of
the very matrix that was factored, so that another order of columns, dead inputs or a scale are other factors.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from quant.solver import provided_factors
from workers.memory import free_bytes

HOST_SHARE, DEVICE_SHARE = 4, 2
"""Where no budget is given: one part in so many of the free memory, with what is kept counted as free. n workers of a host together keep at
most n / (n + 3) of it. A GPU is mostly a worker's own, and has a use for more: Hessians and factors of all blocks of a model with 7e9
weights are 44e9 bytes, a third of what the largest GPUs have beside the model."""


@dataclass
class Counts:
    """Of one stage."""

    statistics_read: int = 0
    """Files of statistics that were kept."""
    statistics_loaded: int = 0
    """Files read from artifacts."""
    factors_read: int = 0
    """Factors that were kept."""
    factors_made: int = 0


@dataclass
class _Entry:
    value: Any
    bytes: int
    stage: int
    """In which it was last used."""


class Kept:
    """Entries on one device under one budget of bytes. The least recently used goes first, but none that the running stage has used: a
    stage walks the blocks in order, and so does the next one. Were a stage's blocks to push one another out, each would be gone when
    its turn comes again; so what no longer fits is not kept."""

    def __init__(self, free: Callable[[torch.device], int] = free_bytes) -> None:
        """free: bytes that a device has left."""
        self._free = free
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._device = torch.device("cpu")
        self._given: int | None = 0
        self._stage = 0
        self.bytes = 0
        self.counts = Counts()
        self.changing: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered around every change of `bytes`."""

    def begin(self, device: torch.device, budget: int | None) -> None:
        """A stage starts. budget: bytes, 0 for none; None for a share of what is free, anew whenever something comes in."""
        if device != self._device:
            self.clear()
        self._device, self._given = device, budget
        self._stage += 1
        self.counts, self.changing = Counts(), nullcontext
        if self.bytes:
            limit = self.budget()
            self._drop_while(lambda: self.bytes > limit)

    def budget(self) -> int:
        """Bytes."""
        if self._given is not None:
            return self._given
        return (self._free(self._device) + self.bytes) // (HOST_SHARE if self._device.type == "cpu" else DEVICE_SHARE)

    def told(self) -> dict[str, int]:
        """Of the running stage, for its record; empty where it asked for nothing."""
        return {**asdict(self.counts), "bytes": self.bytes} if any(asdict(self.counts).values()) else {}

    def statistics(self, digest: str, read: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Tensors of the file with this digest, by name; not to be changed in place."""
        found: Mapping[str, Tensor] | None = self._get(digest)
        if found is not None:
            self.counts.statistics_read += 1
            return found
        self.counts.statistics_loaded += 1
        found = read()
        self._put(digest, found, sum(t.nbytes for t in found.values()))
        return found

    def factor(
        self, origin: tuple[str, str], form: str, hessian: Tensor, damp: float, make: Callable[[], tuple[Tensor, float]]
    ) -> tuple[Tensor, float]:
        """The factor of `hessian` `[K, K]` that `make` gives, and the damping it needed. origin: digest of the file that the Hessian
        comes from, and its site; form: which factor it is. A quant.solver.FactorProvider, once the origin is bound."""
        if self._given == 0:
            self.counts.factors_made += 1
            return make()
        # Threads: a CPU's library splits sums by them, and the last bits follow.
        key = (*origin, form, damp, hessian.dtype, torch.get_num_threads(), matrix_digest(hessian))
        found: tuple[Tensor, float] | None = self._get(key)
        if found is not None:
            self.counts.factors_read += 1
            return found
        self.counts.factors_made += 1
        found = make()
        self._put(key, found, found[0].nbytes)
        return found

    @contextmanager
    def factors(self, origin: str | None, site: str) -> Iterator[None]:
        """While it lasts, the solver asks here for the factors of a site's Hessian. origin: digest of the Hessian's file; None where
        it is not of an artifact, and nothing is kept."""
        if origin is None:
            yield
            return
        with provided_factors(partial(self.factor, (origin, site))):
            yield

    def make_room(self, needed: int) -> None:
        """Give back, least recently used first, until so many bytes are free or nothing is left."""
        self._drop_while(lambda: self._free(self._device) < needed)

    def clear(self) -> None:
        """Give everything back."""
        self._drop_while(lambda: True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _get(self, key: Hashable) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.stage = self._stage
        self._entries.move_to_end(key)
        return entry.value

    def _put(self, key: Hashable, value: Any, size: int) -> None:
        limit = self.budget()
        used_now = sum(e.bytes for e in self._entries.values() if e.stage == self._stage)
        if used_now + size > limit:
            return
        self._drop_while(lambda: self.bytes + size > limit)
        with self.changing():
            self._entries[key] = _Entry(value, size, self._stage)
            self.bytes += size

    def _drop_while(self, wanted: Callable[[], bool]) -> None:
        while self._entries and wanted():
            with self.changing():
                self.bytes -= self._entries.popitem(last=False)[1].bytes


HASHED = 2**23
"""Numbers of a matrix at a time: 64 MB of products."""


def matrix_digest(matrix: Tensor) -> bytes:
    """SHA-256 of a matrix `[K, K]`, or where it is not on the host of its `row_sums`: a fraction of the time of factoring it."""
    told = matrix if matrix.device.type == "cpu" else row_sums(matrix)
    return hashlib.sha256(told.contiguous().cpu().numpy()).digest()


def row_sums(matrix: Tensor) -> Tensor:
    """`[K]` int64 of a matrix `[K, *]`: of each row the sum, modulo 2⁶⁴, of its numbers' bits times random odd ones. A row with one other
    number has another sum for certain, any other row but for one case in about 2³²; matrices of one site differ in many rows."""
    bits = matrix.contiguous().view(torch.int32)
    odd = _odd(bits.shape[1], bits.device)
    return torch.cat([(rows * odd).sum(1) for rows in bits.split(max(1, HASHED // bits.shape[1]))])


@lru_cache(maxsize=16)
def _odd(count: int, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (count,), generator=g) * 2 + 1).to(device)


_process: Kept | None = None


def process_kept() -> Kept:
    """The one of this process."""
    global _process
    if _process is None:
        _process = Kept()
    return _process
