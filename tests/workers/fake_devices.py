"""Stand-ins for what only a GPU has: NVML, and graphs of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.generation import WARM


class FakeNvml:
    """The module pynvml, of one GPU. Each reading of the counter finds 12 J more than the last. `refuses`: questions that it answers with
    its error, as of a device that does not support them."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, *refuses: str, divided: int = 0) -> None:
        self._refuses, self._divided, self._millijoules = refuses, divided, 1e9

    def __getattribute__(self, name: str) -> object:
        if name.startswith("nvml") and name in object.__getattribute__(self, "_refuses"):
            return self._no
        return object.__getattribute__(self, name)

    def _no(self, *given: object) -> None:
        raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:
        return None

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1200, 2: 2000}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        return self._divided, self._divided

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
        self._millijoules += 12_000
        return self._millijoules


def fake_capture(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """As `workers.generation.captured`: what replays reads and writes the same tensors every time, and returns nothing."""
    for _ in range(WARM):
        step()
    out = torch.full_like(step(), torch.nan)
    return lambda: out.copy_(step()), out
