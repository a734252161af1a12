"""Where a stage ran: versions, processor, device. For records; never identity."""

from __future__ import annotations

import os
import platform
import socket
from functools import lru_cache
from importlib import metadata
from typing import Any

from workers.machine import cpu_model

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton", "hqq", "llmcompressor", "compressed-tensors", "auto-round")


def environment(device: str) -> dict[str, Any]:
    """JSON description of this process; `device` as torch writes it (cpu, cuda:0)."""
    import torch

    return {**_fixed(device), "threads": torch.get_num_threads()}


@lru_cache(maxsize=8)
def _fixed(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "hostname": socket.gethostname(),
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "device": device,
        "device_name": cpu_model(),
    }
    if device.startswith("cuda"):
        found["device_name"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
