"""What a worker process keeps of calibrate artifacts between stages: statistics as they were read, and the factors of Hessians made
from them. Both serve every further method, bit-width and group size with propagation=original; statistics of already quantized blocks
are a stage's own and never come here. What a GPU's budget has no room for, the host's memory keeps.

Nothing kept changes a result: statistics are found by the digest of their file, factors by the file, the site, the damping and a digest of
the very matrix that was factored, so that another order of columns, dead inputs or a scale are other factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from quant.accounting import size_bytes
from quant.factors import provided_factors
from quant.kernels import kernel
from workers.memory import free_bytes

HOST_SHARE, DEVICE_SHARE = 4, 2
"""Where no budget is given: one part in so many of the free memory, with what is kept counted as free. n workers of a host together keep at
most n / (n + 3) of it. A GPU is mostly a worker's own, and has a use for more: Hessians and factors of all blocks of a model with 7e9
weights are 44e9 bytes, a third of what the largest GPUs have beside the model."""
CPU = torch.device("cpu")


@dataclass
class Counts:
    """Of one stage."""

    statistics_read: int = 0
    """Files of statistics that were kept on the device."""
    statistics_read_host: int = 0
    """Those that the host kept for it."""
    statistics_loaded: int = 0
    """Files read from artifacts."""
    factors_read: int = 0
    """Factors that were kept on the device."""
    factors_read_host: int = 0
    """Those that the host kept for it."""
    factors_made: int = 0


@dataclass
class Entry:
    value: Any
    """Tensors by name, or a factor and the damping that it needed."""
    bytes: int
    stage: int
    """In which it was last used."""


class Tier:
    """Entries in one memory under one budget of bytes. The least recently used goes first, but none that the running stage has used: a
    stage walks the blocks in order, and so does the next one. Were a stage's blocks to push one another out, each would be gone when
    its turn comes again; so what no longer fits does not come in."""

    def __init__(
        self,
        free: Callable[[torch.device], int],
        goes: Callable[[Hashable, Entry], None] = lambda key, entry: None,
        changing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """free: bytes that a device has left. goes: takes what has to go. changing: entered around every change of `bytes`."""
        self._free, self._goes, self._changing = free, goes, changing
        self._entries: dict[Hashable, Entry] = {}
        self.device, self.bytes = CPU, 0
        self.given: int | None = 0
        """Budget, as `begin` has it."""

    def begin(self, device: torch.device, budget: int | None) -> None:
        """A stage starts. budget: bytes, 0 for none; None for a share of what is free, anew whenever something comes in."""
        self.device, self.given = device, budget
        if self.bytes:
            limit = self.budget()
            self.push_while(lambda: self.bytes > limit)

    def budget(self) -> int:
        """Bytes."""
        if self.given is not None:
            return self.given
        return (self._free(self.device) + self.bytes) // (HOST_SHARE if self.device.type == "cpu" else DEVICE_SHARE)

    def get(self, key: Hashable, stage: int) -> Any:
        """The value, used by that stage; None where there is none."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        entry.stage = stage
        self._entries[key] = entry
        return entry.value

    def makes_room(self, size: int, stage: int) -> bool:
        """For an entry last used in that stage; only entries that earlier ones used go for it."""
        limit = self.budget()
        if size + sum(e.bytes for e in self._entries.values() if e.stage >= stage) > limit:
            return False
        self.push_while(lambda: self.bytes + size > limit)
        return True

    def add(self, key: Hashable, entry: Entry) -> None:
        """Where room was made for it."""
        with self._changing():
            self._entries[key] = entry
            self.bytes += entry.bytes

    def take(self, key: Hashable) -> Entry | None:
        """It is no longer here."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.bytes
        return entry

    def push_while(self, wanted: Callable[[], bool]) -> None:
        """Entries go, least recently used first, as long as that is wanted and there are any."""
        while self._entries and wanted():
            # Of a stage's own the first: every use puts an entry last. What another tier lets go may come in after what was used later.
            key = min(self._entries, key=lambda k: self._entries[k].stage)
            with self._changing():  # the memory is free when it ends: nothing here holds the entry
                self.bytes -= self._entries[key].bytes
                self._goes(key, self._entries.pop(key))


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """With the same strides, which products go by. On the host in pinned memory, from where a GPU takes it fastest."""
    if device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    return torch.empty_like(tensor, device=device, pin_memory=tensor.is_cuda).copy_(tensor)


class Kept:
    """Entries on the device that stages run on; what a GPU's budget has no room for is in the host's memory, and comes back by a copy when
    it is asked for. An entry is in one of the two tiers."""

    def __init__(self, free: Callable[[torch.device], int] = free_bytes, copied: Callable[[Tensor, torch.device], Tensor] = copied) -> None:
        """free: bytes that a device has left. copied: how tensors get from one to another."""
        self._free, self._copied = free, copied
        self._near = Tier(free, self._to_host, lambda: self.changing())
        self._host = Tier(free)
        self._stage = 0
        self._one = Lock()  # inputs that are rounded side by side ask for their factors at the same time
        self.counts = Counts()
        self.changing: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered around every change of `bytes`."""

    @property
    def bytes(self) -> int:
        """On the device."""
        return self._near.bytes

    @property
    def host_bytes(self) -> int:
        """On the host, of a GPU's entries."""
        return self._host.bytes

    def begin(self, device: torch.device, budget: int | None, host_budget: int | None = None) -> None:
        """A stage starts. budget: bytes on the device, 0 for none anywhere; None for a share of what is free, anew whenever something comes
        in. host_budget: likewise on the host, beside a GPU."""
        if device != self._near.device:
            self.clear()
        self._stage += 1
        self.counts, self.changing = Counts(), nullcontext
        self._host.begin(CPU, 0 if budget == 0 or device.type == "cpu" else host_budget)
        self._near.begin(device, budget)

    def told(self) -> dict[str, int]:
        """Of the running stage, for its record; empty where it asked for nothing."""
        counts = asdict(self.counts)
        return {**counts, "bytes": self.bytes, "host_bytes": self.host_bytes} if any(counts.values()) else {}

    def statistics(self, digest: str, read: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Tensors of the file with this digest, by name; not to be changed in place."""
        found: Mapping[str, Tensor] | None = self._get(digest, "statistics_read")
        if found is not None:
            return found
        self.counts.statistics_loaded += 1
        found = read()
        self._keep(digest, found)
        return found

    def factor(
        self, origin: tuple[str, str], form: str, hessian: Tensor, damp: float, make: Callable[[], tuple[Tensor, float]]
    ) -> tuple[Tensor, float]:
        """The factor of `hessian` `[K, K]` that `make` gives, and the damping it needed. origin: digest of the file that the Hessian
        comes from, and its site; form: which factor it is. A quant.factors.FactorProvider, once the origin is bound."""
        if self._near.given == 0:
            with self._one:
                self.counts.factors_made += 1
            return make()
        # Threads: a CPU's library splits sums by them, and the last bits follow.
        key = (*origin, form, damp, hessian.dtype, torch.get_num_threads(), matrix_digest(hessian))
        with self._one:
            found: tuple[Tensor, float] | None = self._get(key, "factors_read")
        if found is not None:
            return found
        found = make()
        with self._one:
            self.counts.factors_made += 1
            self._keep(key, found)
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
        """Give the device's memory back, least recently used first, until so many bytes are free or nothing is left."""
        self._near.push_while(lambda: self._free(self._near.device) < needed)

    def clear(self) -> int:
        """Give everything back, and keep nothing on the host until the next stage. Returns how many bytes that were."""
        given_back = self.bytes + self.host_bytes
        self._host.begin(CPU, 0)
        self._near.push_while(lambda: True)
        if self._near.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator, "empty_host_cache"):  # what was pinned; older versions of torch have no way to
                torch.accelerator.empty_host_cache()
        return given_back

    def _get(self, key: Hashable, count: str) -> Any:
        """The value, on the device; None where nothing is kept. count: of `Counts`, where it is on the device already."""
        found = self._near.get(key, self._stage)
        if found is None:
            found, count = self._from_host(key), f"{count}_host"
        if found is not None:
            setattr(self.counts, count, getattr(self.counts, count) + 1)
        return found

    def _keep(self, key: Hashable, value: Any) -> None:
        entry = Entry(value, size_bytes(*_tensors(value)), self._stage)
        if self._near.makes_room(entry.bytes, entry.stage):
            self._near.add(key, entry)
        else:
            self._to_host(key, entry)

    def _to_host(self, key: Hashable, entry: Entry) -> None:
        # Torch pins a power of two for each tensor.
        size = sum(1 << (t.nbytes - 1).bit_length() for t in _tensors(entry.value) if t.nbytes)
        if self._host.makes_room(size, entry.stage):
            self._host.add(key, Entry(self._moved(entry.value, CPU), size, entry.stage))

    def _from_host(self, key: Hashable) -> Any:
        held = self._host.take(key)
        if held is None:
            return None
        value, held.stage = self._moved(held.value, self._near.device), self._stage
        size = size_bytes(*_tensors(value))
        # What has to go for it finds the room that it leaves.
        if self._near.makes_room(size, held.stage):
            self._near.add(key, Entry(value, size, held.stage))
        else:
            self._host.add(key, held)
        return value

    def _moved(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, Mapping):
            return {name: self._copied(t, device) for name, t in value.items()}
        factor, damp = value
        return self._copied(factor, device), damp


def _tensors(value: Any) -> list[Tensor]:
    return list(value.values()) if isinstance(value, Mapping) else [value[0]]


def matrix_digest(matrix: Tensor) -> bytes:
    """SHA-256 of a matrix `[K, K]`, or where it is not on the host of its `row_sums`: a fraction of the time of factoring it."""
    told = matrix if matrix.device.type == "cpu" else row_sums(matrix)
    return hashlib.sha256(told.contiguous().cpu().numpy().data).digest()


def row_sums(matrix: Tensor) -> Tensor:
    """`[K]` int64 of a matrix `[K, *]`: of each row the sum, modulo 2⁶⁴, of its numbers' bits times random odd ones. A row with one other
    number has another sum for certain, any other row but for one case in about 2³²; matrices of one site differ in many rows."""
    bits = matrix.contiguous().view(torch.int32)
    told: Tensor = kernel("row_sums", device=bits.device).run.row_sums(bits, _odd(bits.shape[1], bits.device))
    return told


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
