"""What Triton kernels share on the host's side. Triton is optional: it is imported when a kernel first runs, in an operation's
`program.py`.

A program is written once for all devices that Triton compiles for. With TRITON_INTERPRET=1, set before Triton is imported, it runs on
CPU tensors, slowly, one program after another: that is how tests run it.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

# Read when Triton is imported, which otherwise warns that its own choice is to change. `gptq_block` says what it needs.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Tile:
    """Of a matrix, which a program makes, and how."""

    rows: int
    columns: int
    step: int
    """Of what is summed over: as much of it as is multiplied at a time."""
    warps: int
    stages: int


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """None, or why Triton kernels do not run on the device."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"Triton kernels take CUDA tensors, not those on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"Triton kernels need compute capability 8.0, {device} has {'.'.join(map(str, capability))}"
    return None


def early(device: torch.device) -> dict[str, bool]:
    """Options with which a kernel starts before the one in front of it is over, where the device can. Its program has a constant EARLY,
    with which it waits, by `gdc_wait`, before it reads or writes memory."""
    return {"EARLY": True, "launch_pdl": True} if starts_early(device) else {"EARLY": False}


@cache
def starts_early(device: torch.device) -> bool:
    return not interpreted() and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def leave_shared_memory(function: int) -> None:
    """Have multiprocessors keep all the shared memory they can while a kernel of the driver's runs, so that the next one, which takes most
    of it, starts beside it. A wish that the driver may leave alone."""
    preferred_carveout, percent = 9, 100
    ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), preferred_carveout, percent)


@cache
def multiprocessors(device: torch.device) -> int:
    """1 where there is no GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@cache
def has_gluon(program: str) -> bool:
    """Whether this Triton has what a module of Gluon programs imports: Gluon is not settled."""
    try:
        if find_spec("triton.experimental.gluon") is None:
            return False
        import_module(program)
    except (ImportError, AttributeError):
        return False
    return True
