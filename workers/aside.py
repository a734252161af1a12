"""Work that nothing waits for until a block is written: on a GPU on a stream of its own, beside the forward that is queued next.

A host that reads a figure, or packs what it has to count first, waits for that stream alone and goes on queueing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def moment(device: torch.device) -> torch.cuda.Event | None:
    """After all that is queued on the device so far; None on a CPU, where everything is done at once."""
    if device.type != "cuda":
        return None
    return _queued(device)


def _queued(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def aside(device: torch.device, *leaves: Tensor, after: torch.cuda.Event | None = None) -> Iterator[None]:
    """What is queued here begins after all that the current stream has (or had at `after`). leaves: tensors that are read here and that
    their owner may give up before `join`."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_event(after or _queued(device))
    for tensor in leaves:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def join(device: torch.device) -> None:
    """What is queued from now on comes after all that was done aside: memory that this reads may be used anew."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream(device))


def number(figure: Tensor) -> float:
    """Of a `[]` made aside."""
    if not figure.is_cuda:
        return float(figure)
    with torch.cuda.stream(_stream(figure.device)):
        return float(figure)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for a device, whether it is named by its number or as the current one."""
    return _numbered(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _numbered(device: int) -> torch.cuda.Stream:
    """torch hands out streams in turn: others may come to have the same one, and wait for each other then."""
    return torch.cuda.Stream(device)
