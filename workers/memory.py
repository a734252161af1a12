"""Peak memory of a stage, on the device it runs on."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """That a stage could still take: on CUDA including what torch keeps for reuse."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)


class PeakMemory:
    """Device memory on CUDA; on the CPU the process's resident set, which other work in the process shares."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def bytes(self) -> int:
        """Highest use since construction (where the system cannot reset it: since the process started)."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return _resident_peak()


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
