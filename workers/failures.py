"""Exceptions of a stage ▸ the class the driver answers by. Standard library only.

Libraries' exceptions are recognised by name and text, so that nothing heavy is imported to report a failure.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from workers.artifact import CorruptArtifactError
from workers.errors import WorkerError
from workers.request import ErrorClass, Failure

LOG = "log.txt"
"""Of a stage, in its staging folder and then in its artifact's."""
TAIL_LINES = 40
MEMORY = frozenset({"MemoryError", "OutOfMemoryError"})
# Not every allocation is one of torch's own allocator: contexts, libraries' workspaces and kernels say it in the driver's words,
# "CUDA error: out of memory" or CUBLAS_STATUS_ALLOC_FAILED; safetensors wraps the operating system's error 12.
MEMORY_TEXT = re.compile(r"out of memory|can(?:'t|not) allocate memory|_ALLOC_FAILED|os error 12\b", re.IGNORECASE)
NETWORK = frozenset({"TransportError"})
"""httpx's class for connections that fail, break or time out."""
NUMERICAL = frozenset({"NonFiniteError", "ScaleDtypeError", "SingularHessianError", "LinAlgError", "_LinAlgError"})
ASKED_FOR = frozenset({"BackendError"})
"""A kernel that a setting names and that does not work here."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MAKE_ROOM = "make free space there and run the sweep again (bitgrid resume): all that was committed is kept"
MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def classify(error: BaseException) -> ErrorClass:
    """First match: corrupt artifact, our own classes, a kernel asked for by name (user), memory, disk, numerical, missing files (user),
    device, network and I/O trouble (infrastructure), anything else (internal)."""
    names = {c.__name__ for c in type(error).__mro__}
    text = str(error)
    if isinstance(error, CorruptArtifactError):
        return ErrorClass.CORRUPT
    if isinstance(error, WorkerError):
        return error.error_class
    if names & ASKED_FOR:
        return ErrorClass.USER
    if names & MEMORY or MEMORY_TEXT.search(text) or getattr(error, "errno", None) == errno.ENOMEM:
        return ErrorClass.MEMORY
    # safetensors and pyarrow wrap the operating system's error in their own.
    if getattr(error, "errno", None) in DISK_FULL or "No space left on device" in text or DISK_FULL & _wrapped(text):
        return ErrorClass.DISK_FULL
    if names & NUMERICAL:
        return ErrorClass.NUMERICAL
    if isinstance(error, MISSING):
        return ErrorClass.USER
    if isinstance(error, OSError) or names & NETWORK or "AcceleratorError" in names or "CUDA error" in text:
        return ErrorClass.INFRASTRUCTURE
    return ErrorClass.INTERNAL


def _wrapped(text: str) -> set[int]:
    """Numbers of the operating system's errors, as libraries written in Rust tell them."""
    return {int(number) for number in re.findall(r"os error (\d+)", text)}


def failure(error: BaseException, log_tail: str) -> Failure:
    error_class = classify(error)
    message = str(error) or type(error).__name__
    return Failure(
        error_class=error_class,
        type=type(error).__name__,
        message=f"{message}; {MAKE_ROOM}" if error_class is ErrorClass.DISK_FULL else message,
        log_tail=log_tail,
        corrupt_key=error.key if isinstance(error, CorruptArtifactError) else None,
    )


def tail(folder: Path) -> str:
    """Last lines of the folder's log."""
    try:
        # A process that was killed may have written half a character.
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL_LINES:])
