"""Kernels of `quant/csrc/*.cu` as nvcc compiles them, launched by their own host code, run on the host (`machine.cpp`)."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels import native, on_cuda
from tests.quant.ptx import parse

OWN = Path(__file__).parent
FAKE = OWN.parent / "fake_device.cpp"
SOURCES = ("arithmetic", "memory", "together", "machine")
GUARD = 1 << 16
"""Bytes on each side of a tensor that are nobody's."""
RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_void_p))
FIXED = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)
KB = 1024
DEVICES = {"90a": (228 * KB, 227 * KB, 9), "80": (164 * KB, 163 * KB, 8)}
"""Target ▸ shared memory of a multiprocessor and of a block, generation."""
ALIGNED, SAID = 512, 4000
"""Bytes."""


class Fault(AssertionError):
    """What the machine found to be wrong."""


@cache
def machine() -> ctypes.CDLL:
    """Skips the test where there is no compiler for it."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("PTX is run on Linux on x86-64, with g++")
    texts = "".join((OWN / f"{n}.cpp").read_text() for n in SOURCES) + (OWN / "state.h").read_text()
    flags = ("-O2", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", *(str(OWN / f"{n}.cpp") for n in SOURCES[:-1]))
    made = ctypes.CDLL(str(native.kept_library(OWN / "machine.cpp", compiler, texts, flags, ((),))))
    made.ptx_read.restype = ctypes.c_void_p
    made.ptx_run.restype = ctypes.c_int64
    return made


class Memory:
    """Copies of tensors' memory, each with nothing on either side; `back` gives them what was written there."""

    def __init__(self, values: Iterable[Tensor | int], late: Iterable[Tensor] = ()) -> None:
        late_at = {t.untyped_storage().data_ptr() for t in late}
        self.kept: dict[int, tuple[int, int, object]] = {}
        self.buffers: list[tuple[int, int, int]] = []
        for storage in (v.untyped_storage() for v in values if isinstance(v, Tensor)):
            at, size = storage.data_ptr(), storage.nbytes()
            if at in self.kept:
                continue
            memory = (ctypes.c_char * (size + 2 * GUARD + ALIGNED))()
            place = -(-(ctypes.addressof(memory) + GUARD) // ALIGNED) * ALIGNED
            ctypes.memmove(place, at, size)
            self.kept[at] = place, size, memory
            self.buffers.append((place, size, int(at in late_at)))

    def address(self, value: Tensor | int) -> int:
        if isinstance(value, int):
            return value
        at = value.untyped_storage().data_ptr()
        return value.data_ptr() - at + self.kept[at][0]

    def back(self) -> None:
        for at, (place, size, _) in self.kept.items():
            ctypes.memmove(at, place, size)


class Module:
    """PTX whose kernels are run.

    seed: of the order in which blocks and warps go on; 0: one after another. steps, most: instructions of warps that were run, and that a
    launch may take. strict: loads of shared memory in a race with a write are faults; else they give what is not a number, as kernels want
    it that load ahead what they do not use.
    """

    def __init__(self, text: str, seed: int = 0) -> None:
        self.text, self.seed, self.steps, self.most = text, seed, 0, 100_000_000
        self.strict = True
        self.read: dict[str, tuple[parse.Kernel, int]] = {}
        self.ran: dict[str, ctypes.Array[ctypes.c_uint8]] = {}

    def kernel(self, name: str) -> tuple[parse.Kernel, int]:
        if name not in self.read:
            made, said = parse.kernel(self.text, name), ctypes.create_string_buffer(SAID)
            program = machine().ptx_read(made.program.encode(), said, ctypes.c_int64(SAID))
            if not program:
                raise Fault(said.value.decode())
            self.read[name] = made, program
            self.ran[name] = (ctypes.c_uint8 * len(made.texts))()
        return self.read[name]

    def launch(
        self, name: str, blocks: Sequence[int], threads: int, parameters: Sequence[bytes], buffers: Iterable[tuple[int, int, int]],
        dynamic: int = 0, cluster: int = 1, early: bool = False,
    ) -> None:  # fmt: skip
        """buffers: of each its address, its bytes and whether the kernel before may still write it. Raises Fault."""
        made, program = self.kernel(name)
        if threads > made.most:
            raise Fault(f"{threads} threads of a kernel that has {made.most} at most")
        whole = bytearray(max((at + n for at, n in made.parameters), default=0))
        for (at, n), value in zip(made.parameters, parameters, strict=True):
            whole[at : at + n] = value
        shape = (ctypes.c_int64 * 12)(
            *blocks, threads, 1, 1, cluster, made.fixed + dynamic, int(early), self.seed, self.most, int(self.strict)
        )
        flat = [n for b in buffers for n in b]
        said, held = ctypes.create_string_buffer(SAID), (ctypes.c_char * (len(whole) + 1)).from_buffer_copy(bytes(whole) + b"\0")
        size, count, room = map(ctypes.c_int64, (len(whole), len(flat) // 3, SAID))
        known = (ctypes.c_int64 * (len(flat) + 1))(*flat)
        steps = machine().ptx_run(ctypes.c_void_p(program), shape, held, size, known, count, self.ran[name], said, room)
        if steps < 0:
            raise Fault(f"{name}, {' x '.join(map(str, blocks))} blocks of {threads} threads: {said.value.decode()}")
        self.steps += steps

    def run(self, name: str, blocks: int, threads: int, *values: Tensor | int, late: Iterable[Tensor] = (), **more: Any) -> None:
        """Of tensors and whole numbers. late: what the kernel before may still write."""
        memory, sizes = Memory(values, late), [n for _, n in self.kernel(name)[0].parameters]
        given = [(memory.address(v) % 2 ** (8 * n)).to_bytes(n, "little") for v, n in zip(values, sizes, strict=True)]
        self.launch(name, (blocks, 1, 1), threads, given, memory.buffers, **more)
        memory.back()

    def never(self) -> dict[str, list[str]]:
        """Of kernels that were launched, the instructions that were not run."""
        names = [n for n in self.read if any(self.ran[n])]
        return {n: [t for t, r in zip(self.read[n][0].texts, self.ran[n], strict=True) if not r] for n in names}


class Program(Module):
    """A library of CUDA C++ whose host code launches what is run here. more: nvcc's options beside the usual."""

    def __init__(self, source: Path, target: str = "90a", seed: int = 0, more: Sequence[str] = ()) -> None:
        nvcc = on_cuda.compiler()
        if nvcc is None:
            pytest.skip("there is no nvcc")
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        code = f"-gencode=arch=compute_{target},code=compute_{target}"
        # The runtime is the fake one, each library's own; code for devices is there as PTX.
        flags = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "-no-compress", "-w", code)
        link = ("-Xlinker", "-Bsymbolic", str(FAKE))
        path = native.kept_library(source, nvcc, said + FAKE.read_text(), (*flags, *more, *link), ((),))
        super().__init__("\n".join(m.decode() for m in re.findall(rb"\.version [^\0]*", path.read_bytes())), seed)
        self.library, self.target, self.failed = ctypes.CDLL(str(path)), target, ""
        self.buffers: list[tuple[int, int, int]] = []
        self.numbers: dict[tuple[int, int, int | None], int] = {}
        self.threads = 0
        """Of a block of the latest launch."""
        self._run, self._fixed = RUN(self._launched), FIXED(lambda name: self.kernel(name.decode())[0].fixed)
        for symbol, own in (("fake_run", self._run), ("fake_fixed", self._fixed)):
            ctypes.c_void_p.in_dll(self.library, symbol).value = ctypes.cast(own, ctypes.c_void_p).value
        self.on()

    def on(self, multiprocessors: int = 132, clusters: int = 15, shared: int | None = None) -> None:
        """The device: multiprocessors, clusters that it runs at once, and bytes of shared memory that a block may have. Libraries know a
        device by its number."""
        number = self.numbers.setdefault((multiprocessors, clusters, shared), len(self.numbers))
        each, block, generation = DEVICES[self.target]
        memory = (each, block) if shared is None else (shared + KB, shared)
        self.library.fake_device(*map(ctypes.c_int64, (number, multiprocessors, *memory, generation)))
        ctypes.c_int.in_dll(self.library, "fake_clusters").value = clusters

    def _launched(self, name: bytes, launched: Any, given: Any) -> int:
        try:
            *blocks, threads, dynamic, early, cluster = launched[:7]
            self.threads = threads
            sizes = [n for _, n in self.kernel(name.decode())[0].parameters]
            parameters = [ctypes.string_at(given[i], n) for i, n in enumerate(sizes)]
            self.launch(name.decode(), blocks, threads, parameters, self.buffers, dynamic, cluster, bool(early))
        except Exception as e:  # a callback's go nowhere
            self.failed = f"{type(e).__name__}: {e}"
            return 1
        return 0

    def call(self, function: str, *values: Tensor | int, late: Iterable[Tensor] = (), also: Iterable[Tensor] = ()) -> None:
        """As `on_cuda.call`, of CPU tensors. late: what the kernel before may still write. also: those of which a tensor on the host has
        addresses, where they are."""
        memory = Memory(values, late)
        others = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), 0) for t in also]
        self.buffers, self.failed = [*memory.buffers, *others], ""
        failed = getattr(self.library, function)(*(ctypes.c_int64(memory.address(v)) for v in (*values, 0)))
        if self.failed or failed:
            raise Fault(self.failed or f"{function} failed with CUDA error {failed}")
        memory.back()


class Programs(defaultdict[str, Program]):
    """Those of `quant/csrc`, by name, each made when it is first asked for."""

    def __init__(self, target: str = "90a", seed: int = 0) -> None:
        super().__init__()
        self.target, self.seed = target, seed

    def __missing__(self, name: str) -> Program:
        self[name] = Program(native.SOURCES / f"{name}.cu", self.target, self.seed)
        return self[name]

    def order(self, seed: int) -> None:
        self.seed = seed
        for program in self.values():
            program.seed = seed


EARLY = {"bitgrid_wq_gemv": (2, 4), "bitgrid_wq_slices": (2, 3, 4, 5), "bitgrid_lut_gemv": (18, 20), "bitgrid_binary_gemv": (4, 6)}
"""Products that may begin before the kernel in front is over ▸ what that one may still read or write: all but weights."""


def on_the_machine(programs: Programs, monkeypatch: pytest.MonkeyPatch, also: list[Tensor] | None = None) -> None:
    """Calls of CUDA libraries are run, on CPU tensors whose empty ones hold what a machine's memory does. also: see `Program.call`."""
    shared = DEVICES[programs.target][1]

    def call(name: str, function: str, *values: Tensor | int) -> None:
        late = [v for i in EARLY.get(function, ()) for v in (values[i],) if isinstance(v, Tensor)]
        programs[name].call(function, *values, late=late, also=also or ())

    monkeypatch.setattr(on_cuda, "call", call)
    monkeypatch.setattr(on_cuda, "shared_memory", lambda device: shared)
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty, programs))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like, programs))
    monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty, programs))


def _poisoned(make: Any, programs: Programs) -> Any:
    def made(*given: Any, **named: Any) -> Tensor:
        t: Tensor = make(*given, **named)
        if t.is_contiguous() and t.numel():
            ctypes.memset(t.data_ptr(), 0x3D if programs.seed % 2 else 0xFF, t.numel() * t.element_size())
        return t

    return made
