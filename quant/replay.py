"""The loop over a site's blocks as a CUDA graph: a GPU is done with a block long before a host has queued the next one.

A loop whose shapes and settings come for the first time is queued as ever, which compiles and loads what it launches. When they come again
it is captured, on memory that stays, and from then on what is given is copied there and the graph replayed: the same launches in the same
order, the same bits. A graph is of one thread and one stream, where each is over before the next begins, so that all of these share memory.

What cannot be captured is queued as ever, with a note.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.during import during

SPARED = 8
"""One part in so many of a device's memory stays free beside the graphs'. While one is captured, torch cannot give back what it keeps for
reuse, so that memory counts as free here where no part of torch has it."""
LINE = 512
"""Bytes, at whose multiples tensors begin."""

Loop = Callable[[Mapping[str, Tensor]], None]
"""Reads and writes tensors by name. It launches the same whatever numbers they hold, waits for nothing and copies nothing from the host."""


@dataclass
class _Place:
    """What one thread replays on one stream."""

    memory: Tensor
    """uint8, of one loop at a time."""
    most: int = 0
    """Bytes that the largest loop seen takes."""
    pool: Any = None
    """Where a graph has the memory that its loop asks for itself."""
    graphs: dict[Hashable, tuple[dict[str, Tensor], Callable[[], None]] | None] = field(default_factory=dict)
    """None: seen once."""


class Replays:
    """The graphs of all threads that share it, and the memory they run on."""

    def __init__(
        self,
        capture: Callable[[Callable[[], None], torch.device, Any], Callable[[], None]] | None = None,
        short: Callable[[torch.device, int], str | None] | None = None,
    ) -> None:
        """capture: makes of a work that it does not do, a device and a pool what does it. short: why so many bytes more are too many, or
        None. Left out, those of a GPU."""
        self._capture, self._short = capture or captured, short or short_of
        self._places: dict[Hashable, _Place] = {}
        self._refused: str | None = None

    def lent(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """float32 `[rows, columns]`, not filled: where the next loop in this thread reads its first tensor, if there is such a place."""
        memory, size = self._place(like.device).memory, 4 * rows * columns
        if memory.numel() < size:
            return like.new_empty(rows, columns, dtype=torch.float32)
        return memory[:size].view(torch.float32).view(rows, columns)

    def run(
        self, key: Hashable, given: Mapping[str, Tensor], made: Mapping[str, Tensor], loop: Loop
    ) -> tuple[Mapping[str, Tensor], str | None]:
        """All tensors as the loop leaves them: those given and those like `made`, which it fills; to be read before the next call in this
        thread. And why they come without a graph, where it was to be one. key: what else the loop's launches go by."""
        first = next(iter(given.values()))
        place = self._place(first.device)
        key = (key, tuple((name, t.shape, t.stride()) for name, t in given.items()))
        if key in place.graphs and self._refused is None and place.graphs[key] is None:
            self._refused = self._captured(place, key, given, made, loop)
        known = place.graphs.get(key)
        if known is None:
            place.graphs.setdefault(key, None)
            place.most = max(place.most, sum(_spans(_likes(given, made))))
            tensors = {**given, **{name: torch.empty_like(t, device=first.device) for name, t in made.items()}}
            loop(tensors)
            return tensors, self._refused
        tensors, replay = known
        for name, t in given.items():
            if t.data_ptr() != tensors[name].data_ptr():
                tensors[name].copy_(t)
        replay()
        return tensors, None

    def clear(self, reason: str | None = None) -> None:
        """Give all memory back, while no other thread is at work. reason: why there are to be no graphs from now on."""
        self._refused = reason or self._refused
        for device in {p.memory.device for p in self._places.values() if p.memory.is_cuda and any(p.graphs.values())}:
            torch.cuda.synchronize(device)
        self._places.clear()

    def _place(self, device: torch.device) -> _Place:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, threading.get_ident())
        if key not in self._places:
            self._places[key] = _Place(torch.empty(0, dtype=torch.uint8, device=device))
        return self._places[key]

    def _captured(self, place: _Place, key: Hashable, given: Mapping[str, Tensor], made: Mapping[str, Tensor], loop: Loop) -> str | None:
        """None, or why there is no graph."""
        device, likes = place.memory.device, _likes(given, made)
        try:
            if place.memory.numel() < place.most:
                # What loops ask for themselves, halves of factors and errors, is less than a third of what they are given.
                reason = self._short(device, place.most + place.most // 3)
                if reason is not None:
                    return reason
                if place.memory.is_cuda:  # the device is not to be waited for while other threads capture
                    torch.cuda.current_stream(device).synchronize()
                place.graphs = dict.fromkeys(place.graphs)
                place.memory = torch.empty(place.most, dtype=torch.uint8, device=device)
                place.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            tensors, at = {}, 0
            for (name, like), span in zip(likes.items(), _spans(likes), strict=True):
                own = place.memory[at : at + like.nbytes].view(like.dtype)
                tensors[name] = own.as_strided(like.shape, like.stride())
                at += span
            place.graphs[key] = tensors, self._capture(lambda: loop(tensors), device, place.pool)
        except RuntimeError as e:  # of torch, CUDA and Triton
            return f"the solver's blocks were queued one by one: capturing them raised {str(e).splitlines()[0][:200]!r}"
        return None


def _likes(given: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without numbers, dense, rows of a matrix as they lie."""
    return {name: torch.empty_like(t, device="meta") for name, t in {**given, **made}.items()}


def _spans(likes: Mapping[str, Tensor]) -> list[int]:
    """Bytes from one to the next."""
    return [-(-t.nbytes // LINE) * LINE for t in likes.values()]


_one = threading.Lock()


def captured(work: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Work's launches as a graph. Nothing that other threads do meanwhile is of it."""
    graph = torch.cuda.CUDAGraph()
    with _one, torch.cuda.stream(_stream(device)):
        # Not by `torch.cuda.graph`: it waits for the device, and gives back all memory that torch keeps for reuse.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """That nobody else has: torch hands out streams of normal priority in turn, and again from the first."""
    return torch.cuda.Stream(device, priority=-1)


def short_of(device: torch.device, needed: int) -> str | None:
    """None, or why so many bytes more leave a GPU too little memory (`SPARED`)."""
    free, total = torch.cuda.mem_get_info(device)
    if free - needed >= total // SPARED:
        return None
    return (
        f"the solver's blocks were queued one by one: a graph of them takes {needed} bytes, which leaves too little of the device's memory"
    )


_current: ContextVar[Replays | None] = ContextVar("replays", default=None)


@contextmanager
def replaying(replays: Replays | None = None) -> Iterator[Replays]:
    """While it lasts, loops are replayed in this thread and in those that run in copies of its context; their memory is given back at its
    end."""
    replays = Replays() if replays is None else replays
    try:
        with during(_current, replays):
            yield replays
    finally:
        replays.clear()


def current() -> Replays | None:
    return _current.get()


def give_back(reason: str) -> None:
    """The memory of all graphs, and there are no more: a device has run out of it."""
    replays = _current.get()
    if replays is not None:
        replays.clear(reason)
