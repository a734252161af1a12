"""Memory that is free, and the peak of a stage, on the device it runs on."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import torch

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Linux's control groups, which bound the memory of containers and of a cluster's jobs; those that this process is in."""


def free_bytes(device: torch.device) -> int:
    """That a stage could still take: on CUDA including what torch keeps for reuse, on a host no more than its control groups leave."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Bytes, of each group that has a limit. Files that the kernel would give up are no use of memory, as in the host's own figure."""
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:  # not on Linux
        return
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, use, top = ("limit_in_bytes", "usage_in_bytes", GROUPS / "memory") if controllers else ("max", "current", GROUPS)
        parts = Path(path).parts[1:]
        for folder in (top.joinpath(*parts[:end]) for end in range(len(parts) + 1)):  # in a container its own may be the top
            try:
                whole, used = (int((folder / f"memory.{name}").read_text()) for name in (limit, use))
                told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group here, or no limit: max
                continue
            yield whole - used + sum(int(told.get(f"total_{files}", told.get(files, 0))) for files in ("active_file", "inactive_file"))


class Keeps(Protocol):
    """What a process keeps between stages (`workers.kept`)."""

    @property
    def bytes(self) -> int: ...

    changing: Callable[[], AbstractContextManager[None]]
    """Entered around every change of `bytes`."""


class PeakMemory:
    """Device memory on CUDA, without what the process keeps for other stages; on the CPU the process's resident set, which other work in
    the process, and what it keeps, share."""

    def __init__(self, device: torch.device, keeps: Keeps | None = None, gauge: Gauge | None = None) -> None:
        """gauge: what tells the memory in use, the device's own when left out."""
        self._gauge = gauge or (CudaGauge(device) if device.type == "cuda" else ResidentGauge())
        self._keeps, self._own = keeps if self._gauge.counts_tensors else None, 0
        if self._keeps is not None:
            self._keeps.changing = self._changing
        self._gauge.reset()

    def bytes(self) -> int:
        """Highest use since construction (where the system cannot reset it: since the process started)."""
        return max(self._own, self._gauge.peak() - (0 if self._keeps is None else self._keeps.bytes))

    def reserved(self) -> int | None:
        """Highest that torch's allocator held of the device since construction, used or for reuse, without what the process keeps now; None
        on a CPU, where it has no part. For stages that change nothing of what is kept."""
        held = self._gauge.reserved()
        return None if held is None else held - (0 if self._keeps is None else self._keeps.bytes)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """So many bytes were kept since the last change, and others are afterwards."""
        self._own = self.bytes()
        yield
        self._gauge.reset()


class Gauge(Protocol):
    counts_tensors: bool
    """Of what is kept it counts every byte."""

    def peak(self) -> int:
        """Most bytes since the last reset."""

    def reserved(self) -> int | None:
        """Likewise, with what an allocator holds for reuse; None where there is none."""

    def reset(self) -> None: ...


class CudaGauge:
    counts_tensors = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device))

    def reserved(self) -> int:
        return int(torch.cuda.max_memory_reserved(self._device))

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


class ResidentGauge:
    counts_tensors = False
    """Pages of a file that a tensor maps come and go."""

    def peak(self) -> int:
        return _resident_peak()

    def reserved(self) -> None:
        return None

    def reset(self) -> None:
        _reset_resident_peak()


def _reset_resident_peak() -> None:
    # Linux: writing 5 resets VmHWM. Elsewhere, or where it is not permitted, the peak stays the process's own.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
