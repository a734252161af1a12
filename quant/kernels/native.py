"""C++ sources of `quant/csrc` as libraries with a plain C ABI, built with the system's compiler at first use.

A library is kept in `$BITGRID_CACHE`, or bitgrid in the user's cache folder, under a name made from its source, flags and
compiler, so that it is built once per machine and never stale. Of processes that want the same library at once one builds it, and the
others wait for that; where files cannot be locked each builds it, and the last one renames a file with the same contents into place.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
# Compilers fuse no multiply-add by themselves: results equal those of the torch twins bit for bit, or fuse where the source says so.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
LONGEST = 300
"""Seconds that a compiler may take, and that one process waits for another's to end."""


class NoLibrary(Exception):
    """Says why there is no library: no compiler, or what it or the file system said."""


def cache_folder() -> Path:
    """Where libraries are kept; it may not be there yet."""
    given = os.environ.get("BITGRID_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitgrid"


@cache
def library(name: str) -> ctypes.CDLL | NoLibrary:
    """The library of `quant/csrc/<name>.cpp`, or the reason why there is none (returned, so that it is found out once)."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))), None)
    if compiler is None:
        return NoLibrary(f"there is no C++ compiler ({', '.join(COMPILERS)}, or $CXX)")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
        # The second try leaves out versions for wider vectors, which not every toolchain can make.
        return ctypes.CDLL(str(kept_library(SOURCES / f"{name}.cpp", compiler, version, FLAGS, ((), ("-DBITGRID_PLAIN",)))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        return NoLibrary(f"the C++ library {name} could not be built: {e}")


def kept_library(source: Path, compiler: str, version: str, flags: Sequence[str], tries: Sequence[Sequence[str]]) -> Path:
    """The library that `compiler` makes of the source, which is made where it is not kept; `tries` are further flags, each tried where
    the ones before fail. Raises RuntimeError with the compiler's message."""
    identity = "\n".join((platform.machine(), version, *flags, *_texts(source, set())))
    folder = cache_folder() / "kernels"
    path = folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if _whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with _turn(path), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if _whole(path):
            return path
        made = Path(scratch) / path.name
        for more in tries:
            command = [compiler, *flags, *more, str(source), "-o", str(made)]
            with apart(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
                _, said = driver.communicate(timeout=LONGEST)
            if driver.returncode == 0:
                os.replace(made, path)
                return path
    raise RuntimeError(said.strip()[-400:] or f"{compiler} ended with {driver.returncode}")


@contextmanager
def apart(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`subprocess.Popen` in a process group of its own, all of which ends with a block that fails or is interrupted: what a command is a
    driver of would run on."""
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as driver:
        try:
            yield driver
        except BaseException:
            if hasattr(os, "killpg"):
                with suppress(ProcessLookupError):
                    os.killpg(driver.pid, signal.SIGKILL)
            else:
                driver.kill()
            raise


def _whole(path: Path) -> bool:
    """Whether the file is there to its end, which a machine that stopped may not have written: one whose end is missing ends the process
    that loads it. ELF of 64 bits, lowest byte first, says where its last table is; of others only an empty file is found out."""
    try:
        with path.open("rb") as file:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    if head[:6] != b"\x7fELF\x02\x01":
        return size > 0
    if len(head) < 64:
        return False
    (tables,), (each, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return int(tables) + int(each) * int(count) <= size


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """While it lasts no other process builds the library at the path; it begins at once where one has been built. It ends with the process,
    however that ends. It only saves work: where files cannot be locked, or no turn comes in `LONGEST` seconds, each process builds."""
    lock = path.with_suffix(".lock")
    try:
        file = None if fcntl is None else lock.open("a")
    except OSError:  # that the folder cannot be written to is said where the library is
        file = None
    if file is None:
        yield
        return
    with file:
        mine = _locked(file, path)
        try:
            yield
        finally:
            if mine:
                # Those who wait for it have it open; who comes later finds the library, or makes a lock of their own.
                lock.unlink(missing_ok=True)


def _locked(file: IO[str], path: Path) -> bool:
    """Waits for the lock, or for the library at the path."""
    until = time.monotonic() + LONGEST
    while not _whole(path) and time.monotonic() < until:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return False
        else:
            return True
    return False


def _texts(source: Path, seen: set[Path]) -> Iterator[str]:
    """Of the source and of what it includes from its own folder, each once: what the library depends on, and no other header."""
    seen.add(source)
    text = source.read_text()
    yield text
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        header = source.parent / name
        if header not in seen and header.is_file():
            yield from _texts(header, seen)


def unavailable(name: str, device: torch.device) -> str | None:
    """None, or why the library does not work on the device."""
    if device.type != "cpu":
        return f"the C++ library works on CPU tensors, not on {device}"
    found = library(name)
    return str(found) if isinstance(found, NoLibrary) else None


def call(name: str, function: str, *values: Tensor | int) -> None:
    """`function` of a library. Tensors, contiguous, are passed as addresses: the caller keeps them until it is over.

    Raises RuntimeError where there is no library."""
    found = library(name)
    if isinstance(found, NoLibrary):
        raise RuntimeError(str(found))
    entry = getattr(found, function)
    entry.restype = None
    # Addresses and counts alike are 64-bit integers.
    entry(*(ctypes.c_int64(v.data_ptr() if isinstance(v, Tensor) else v) for v in values))
