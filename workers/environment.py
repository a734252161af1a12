"""Where a stage ran: versions, processor, device. For records; never identity."""

from __future__ import annotations

import os
import platform
import socket
from functools import lru_cache
from typing import Any

import psutil

from workers import nvml
from workers.machine import cpu_model, releases

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "triton",
    "hqq",
    "llmcompressor",
    "compressed-tensors",
    "auto-round",
    "nvidia-ml-py",
)


def environment(device: str) -> dict[str, Any]:
    """JSON description of this process; `device` as torch writes it (cpu, cuda:0)."""
    import torch

    return {**_fixed(device), "threads": torch.get_num_threads()}


def clocks_mhz(device: str) -> dict[str, float]:
    """What it runs at now: `sm` and `memory` of a GPU, `cpu`, all cores' mean. Empty where nothing tells."""
    if device.startswith("cuda"):
        try:
            return nvml.gpu(device).clocks_mhz()
        except nvml.NotTold:
            return {}
    return _cpu_clock("current")


def _cpu_clock(which: str) -> dict[str, float]:
    try:
        found = psutil.cpu_freq()
    except (AttributeError, NotImplementedError, OSError):  # as systems differ
        return {}
    value = float(getattr(found, which, 0) or 0)
    return {"cpu": value} if value else {}


@lru_cache(maxsize=8)
def _fixed(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": releases(PACKAGES),
        "hostname": socket.gethostname(),
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "device": device,
        "device_name": cpu_model(),
    }
    if not device.startswith("cuda"):
        found["highest_clocks_mhz"] = _cpu_clock("max")
        return found
    found["device_name"] = torch.cuda.get_device_name(device)
    found["cuda"] = torch.version.cuda
    found["driver"], found["highest_clocks_mhz"] = None, {}
    try:
        gpu = nvml.gpu(device)
        found["driver"], found["highest_clocks_mhz"] = gpu.driver(), gpu.highest_clocks_mhz()
    except nvml.NotTold as e:
        found["nvml"] = str(e)
    return found
