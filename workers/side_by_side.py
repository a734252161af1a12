"""On a GPU the linears of a block's inputs are rounded at the same time, a stream for each input.

A solver goes column by column, or block by block, and leaves most of a GPU idle; what reads another input waits for none of it. Each has
the results that it has alone: nothing is shared but what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from threading import local
from typing import TypeVar

import torch

from workers.memory import free_bytes
from workers.rounding import BlockQuantizer

STREAMS = 4
"""At a time: a decoder block has so many inputs, one of experts more."""
MATRICES, WEIGHTS = 6, 8
"""As much memory as a solver may take beside its arguments, in float32 Hessians of its input and in weights."""

T = TypeVar("T")


def fit(worker: BlockQuantizer, sites: Sequence[Sequence[str]], free: Callable[[torch.device], int] = free_bytes) -> bool:
    """Whether linears are rounded side by side: two inputs or more on a GPU with room for all of them, and methods that draw no numbers,
    whose order would follow the threads'."""
    names = [n for own in sites for n in own]
    if len(sites) < 2 or not names:
        return False
    device = worker.weights.current[names[0]].device
    if device.type != "cuda" or any(worker.methods[n].rounding.uses_seed for n in names):
        return False
    return needed(worker, sites) <= free(device) // 2


def needed(worker: BlockQuantizer, sites: Sequence[Sequence[str]]) -> int:
    """Bytes, of as many sites as run at a time."""
    weights = worker.weights.current
    each = [4 * (MATRICES * weights[own[0]].shape[1] ** 2 + WEIGHTS * sum(weights[n].numel() for n in own)) for own in sites]
    return sum(sorted(each)[-STREAMS:])


def side_by_side(device: torch.device, works: Mapping[str, Callable[[], T]]) -> dict[str, T | Exception]:
    """What each of the works returns or raises, in their order. They begin after what is queued on the device, and what is queued
    afterwards begins after them."""
    grad = torch.is_grad_enabled()
    pool, streams = _threads(device)

    def run(work: Callable[[], T]) -> T | Exception:
        try:
            with _on(_own.stream), torch.set_grad_enabled(grad):  # both are a thread's own
                return work()
        except Exception as e:
            return e.with_traceback(None)  # its frames hold tensors

    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    try:
        # Providers of factors and the record of kernels are the context's.
        waiting = {name: pool.submit(copy_context().run, run, work) for name, work in works.items()}
        return {name: future.result() for name, future in waiting.items()}
    finally:
        # Memory that a stream's tensors leave is given to that stream alone, which waits for this one when it is next used.
        for stream in streams:
            torch.cuda.current_stream(device).wait_stream(stream)


_own = local()


@cache
def _threads(device: torch.device) -> tuple[ThreadPoolExecutor, tuple[torch.cuda.Stream, ...]]:
    """Kept, each with a stream of its own on a GPU: a library has a workspace for every thread on every stream."""
    streams = tuple(torch.cuda.Stream(device) for _ in range(STREAMS)) if device.type == "cuda" else ()
    left = list(streams)

    def begin() -> None:
        _own.stream = left.pop() if streams else None

    return ThreadPoolExecutor(STREAMS, "site", begin), streams


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
