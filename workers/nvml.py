"""What NVIDIA's management library (NVML) tells of a GPU: driver, clocks, energy. Where it tells nothing, why.

Its Python package, nvidia-ml-py, is optional (`pip install bitgrid[gpu]`), and is what torch.cuda itself asks for power and clocks.
"""

from __future__ import annotations

import importlib
import time
from functools import cache
from typing import Any

import torch

MODULE = "pynvml"
"""Of nvidia-ml-py."""
LEAST_S = 1.0
"""The counter of energy moves 10 to 50 times a second: over a shorter time it says little."""


class NotTold(Exception):
    """Why a question has no answer."""


class Gpu:
    """One device as NVML knows it. Every method raises NotTold where the library, the driver or the device does not say."""

    def __init__(self, library: Any, uuid: str) -> None:
        """uuid: the device's, as torch writes it, without `GPU-` before it."""
        self._library = library
        self._ask("nvmlInit")
        self._handle = self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")

    def driver(self) -> str:
        found = self._ask("nvmlSystemGetDriverVersion")
        return found.decode() if isinstance(found, bytes) else str(found)

    def clocks_mhz(self) -> dict[str, float]:
        """At which it runs now."""
        return self._clocks("nvmlDeviceGetClockInfo")

    def highest_clocks_mhz(self) -> dict[str, float]:
        return self._clocks("nvmlDeviceGetMaxClockInfo")

    def energy_j(self) -> float:
        """That the device has taken since its driver was loaded."""
        if self._divided():
            raise NotTold("the GPU is divided (MIG), and its energy is counted for all parts together")
        return float(self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle)) / 1000

    def _clocks(self, question: str) -> dict[str, float]:
        kinds = {"sm": self._library.NVML_CLOCK_SM, "memory": self._library.NVML_CLOCK_MEM}
        return {name: float(self._ask(question, self._handle, kind)) for name, kind in kinds.items()}

    def _divided(self) -> bool:
        try:
            current, _ = self._ask("nvmlDeviceGetMigMode", self._handle)
        except NotTold:  # of a device that cannot be
            return False
        return bool(current)

    def _ask(self, question: str, *given: Any) -> Any:
        try:
            return getattr(self._library, question)(*given)
        except self._library.NVMLError as e:
            raise NotTold(f"{question}: {e}") from e


@cache
def gpu(device: str) -> Gpu:
    """Of a device as torch writes it (cuda:0). Raises NotTold, for a CPU too."""
    place = torch.device(device)
    if place.type != "cuda":
        raise NotTold("NVML knows NVIDIA's GPUs, and this is a CPU")
    try:
        library = importlib.import_module(MODULE)
    except ImportError as e:
        raise NotTold("nvidia-ml-py is not installed; pip install 'bitgrid[gpu]'") from e
    uuid = getattr(torch.cuda.get_device_properties(place), "uuid", None)
    if uuid is None:
        raise NotTold("torch does not tell which of NVML's devices this is")
    return Gpu(library, str(uuid))


class EnergyMeter:
    """Joules of the whole device between `start` and `stop`. Never fails: `reason` says why there is none."""

    def __init__(self, device: torch.device) -> None:
        self.joules: float | None = None
        self.reason: str | None = None
        self._gpu: Gpu | None = None
        self._before: float | None = None
        self._began = 0.0
        try:
            self._gpu = gpu(str(device))
        except NotTold as e:
            self.reason = str(e)
        self._read()

    @property
    def least_s(self) -> float:
        """How long it should run."""
        return 0.0 if self._gpu is None else LEAST_S

    def start(self) -> None:
        self._before, self._began = self._read(), time.perf_counter()

    def stop(self) -> None:
        took, after = time.perf_counter() - self._began, self._read()
        if after is None or self._before is None:
            return
        if took < LEAST_S:
            self.reason = f"all that was timed took {took:.2g} s, and the counter of energy is read over {LEAST_S:g} s or more"
        else:
            self.joules = after - self._before

    def _read(self) -> float | None:
        try:
            return None if self._gpu is None else self._gpu.energy_j()
        except NotTold as e:
            self._gpu, self.reason = None, str(e)
            return None
