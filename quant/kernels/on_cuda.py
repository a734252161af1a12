"""CUDA C++ sources of `quant/csrc` as libraries with a plain C ABI, built with the system's nvcc at first use for the device at hand.

A library is kept beside those in C++ (`quant.kernels.native`) under a name made from its source, flags, compiler and the device's
architecture. nvcc is looked for in `$CUDA_HOME/bin`, on the PATH and in /usr/local/cuda/bin. Every entry takes 64-bit integers (addresses
and counts), a stream last, and returns a cudaError_t.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.kernels.native import SOURCES, NoLibrary, kept_library

FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-cudart", "static")
LEAST_CAPABILITY = (8, 0)
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227}
"""Capability ▸ kilobytes of shared memory that a block may ask for, where torch (before 2.7) does not say; others are taken to have 99."""


def compiler() -> str | None:
    """Path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    places = [*([str(Path(home) / "bin")] if home else []), *os.get_exec_path(), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def target(capability: tuple[int, int]) -> str:
    """nvcc's option for a device. 9.0 gets the instructions that only this generation has."""
    number = f"{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    return f"-gencode=arch=compute_{number},code=sm_{number}"


@cache
def library(name: str, capability: tuple[int, int]) -> ctypes.CDLL | NoLibrary:
    """The library of `quant/csrc/<name>.cu`, or the reason why there is none (returned, so that it is found out once)."""
    nvcc = compiler()
    if nvcc is None:
        return NoLibrary("there is no CUDA compiler (nvcc in $CUDA_HOME/bin, on the PATH or in /usr/local/cuda/bin)")
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
        release = re.search(r"release \S+", said)
        flags = [*FLAGS, target(capability)]
        return ctypes.CDLL(str(kept_library(SOURCES / f"{name}.cu", nvcc, release.group() if release else said, flags, ((),))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        return NoLibrary(f"the CUDA library {name} could not be built: {e}")


def unavailable(name: str, device: torch.device) -> str | None:
    """None, or why the library does not work on the device."""
    if device.type != "cuda":
        return f"the CUDA library works on CUDA tensors, not on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the CUDA library needs compute capability 8.0, {device} has {'.'.join(map(str, capability))}"
    found = library(name, capability)
    return str(found) if isinstance(found, NoLibrary) else None


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may ask for, static and dynamic together."""
    said: int | None = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return said or 1024 * SHARED.get(torch.cuda.get_device_capability(device), 99)


def aligned(*given: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, at addresses that are multiples of 16, as kernels take what they copy 16 bytes at a time. Raises ValueError for others: a
    device would end with an error that nothing after it in the process gets past."""
    whole = tuple(t.contiguous() for t in given)
    for t in whole:
        if t.data_ptr() % 16:
            raise ValueError(f"{tuple(t.shape)}, {t.dtype} begins {t.data_ptr() % 16} bytes after a multiple of 16; give a copy: clone()")
    return whole


def call(name: str, function: str, *values: Tensor | int) -> None:
    """`function` of a library on the current stream of the first tensor's device. Tensors, contiguous, are passed as addresses.

    Raises RuntimeError where there is no library or the launch fails."""
    device = next(v for v in values if isinstance(v, Tensor)).device
    entry = _entry(name, function, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        # Addresses and counts alike are 64-bit integers.
        failed = entry(*(ctypes.c_int64(v.data_ptr() if isinstance(v, Tensor) else v) for v in (*values, stream)))
    if failed:
        raise RuntimeError(f"{function} on {device} failed with CUDA error {failed}")


@cache
def _entry(name: str, function: str, capability: tuple[int, int]) -> Any:
    found = library(name, capability)
    if isinstance(found, NoLibrary):
        raise RuntimeError(str(found))
    entry = getattr(found, function)
    entry.restype = ctypes.c_int
    return entry
