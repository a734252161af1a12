"""Sources of `quant/csrc/*.cu` as libraries that run on the host, thread by thread (`cuda_on_host.h`), or as reports of what nvcc makes of
them. For tests."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.native import SOURCES, kept_library
from quant.kernels.on_cuda import compiler

EMULATED = ("claq_block", "kmeans_columns", "braq_search", "braq_block")
HEADER, THREADS = Path(__file__).with_name("cuda_on_host.h"), SOURCES / "host_threads.h"
# Some systems' compilers fortify `longjmp`, which then refuses to change stacks.
FLAGS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-include", str(HEADER), "-x", "c++")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@cache
def emulated(name: str) -> ctypes.CDLL:
    """Skips the test where it cannot be built."""
    found = shutil.which("g++")
    if found is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("kernels are emulated on Linux on x86-64, with g++")
    # The emulation is part of what the library is made from.
    return ctypes.CDLL(str(kept_library(SOURCES / f"{name}.cu", found, HEADER.read_text() + THREADS.read_text(), FLAGS, ((),))))


def on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a CUDA library run its host version, on CPU tensors, as on a device of compute capability 9.0."""
    emulated(name)
    monkeypatch.setattr(on_cuda, "call", call)
    monkeypatch.setattr(on_cuda, "shared_memory", lambda device: 227 * 1024)


def call(name: str, function: str, *values: Tensor | int) -> None:
    """As `on_cuda.call`, of CPU tensors."""
    addresses = (v.data_ptr() if isinstance(v, Tensor) else v for v in (*values, 0))
    failed = getattr(emulated(name), function)(*map(ctypes.c_int64, addresses))
    assert failed == 0, f"{function} would not start"


def asked(name: str, function: str, *values: Tensor | int) -> tuple[int, int, int, int]:
    """What the call would launch: blocks (x, y), threads, and bytes of dynamic shared memory, which are within the limits of compute
    capability 9.0."""
    said = (ctypes.c_int64 * 4)()
    emulated(name).emulated_ask(said)
    try:
        call(name, function, *values)
    finally:
        emulated(name).emulated_ask(None)
    x, y, threads, shared = said
    assert threads % 32 == 0
    return x, y, threads, shared


def compiled(name: str, architecture: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Kernel ▸ bytes of stack, of spill stores and of spill loads, as nvcc says. Skips the test where there is none."""
    nvcc = compiler()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-O3", "-std=c++17", "-cubin", target, "-Xptxas", "-v", str(SOURCES / f"{name}.cu"), "-o", os.fspath(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = re.findall(r"Function properties for (\S+)", done.stderr)
    return dict(zip(names, (tuple(map(int, found)) for found in SPILLS.findall(done.stderr)), strict=True))


def spills_nothing(name: str, architecture: str, folder: Path, kernels: int) -> None:
    """None of a source's kernels, of which there are so many."""
    found = compiled(name, architecture, folder)
    assert len(found) == kernels
    assert set(found.values()) == {(0, 0, 0)}
