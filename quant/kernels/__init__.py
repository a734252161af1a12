"""Kernels: each operation has a plain reference and faster twins; this table is the only place that chooses.

backend: auto takes the first of the operation's row that works on the device; a name of the row insists on that one.
Each twin is a module with the operation's functions and `unavailable(device)`: None, or the reason why it does not work.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

TABLE: dict[str, dict[str, str]] = {
    "gptq_block": {
        "cpu": "quant.kernels.gptq_block.cpu",
        "torch": "quant.kernels.gptq_block.eager",
        "reference": "quant.kernels.gptq_block.reference",
    },
    "kmeans_columns": {
        "cpu": "quant.kernels.kmeans_columns.cpu",
        "torch": "quant.kernels.kmeans_columns.batched",
        "reference": "quant.kernels.kmeans_columns.reference",
    },
    "wq_gemv": {
        "cpu": "quant.kernels.wq_gemv.cpu",
        "reference": "quant.kernels.wq_gemv.reference",
    },
}
"""Operation ▸ backend ▸ module, the fastest first."""


@dataclass(frozen=True)
class Kernel:
    """What was chosen: `run` is the module with the operation's functions."""

    run: Any
    backend: str
    notes: list[str]
    """Why a faster twin for this device was passed over."""


def kernel(operation: str, backend: str = "auto", device: torch.device | str = "cpu") -> Kernel:
    """Raises ValueError for an unknown operation or backend, RuntimeError where the backend asked for does not work."""
    if operation not in TABLE:
        raise ValueError(f"kernel {operation!r} is unknown; choose one of {', '.join(TABLE)}")
    row = TABLE[operation]
    if backend != "auto" and backend not in row:
        raise ValueError(f"backend {backend!r} of {operation} is unknown; choose one of auto, {', '.join(row)}")
    place = torch.device(device)
    notes: list[str] = []
    for name in row if backend == "auto" else [backend]:
        module = import_module(row[name])
        reason = module.unavailable(place)
        if reason is None:
            return Kernel(module, name, notes if place.type == "cpu" else [])
        notes.append(f"{operation} runs slower, with the same result: {reason}")
    raise RuntimeError(f"backend {backend} of {operation} does not work on {place}: {'; '.join(notes)}; choose backend=auto")
