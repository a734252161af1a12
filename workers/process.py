"""What surrounds a stage in its process: device, seeds, threads, determinism and log file. Standard library only at import."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from workers.errors import InputError
from workers.failures import LOG
from workers.request import Hints

if TYPE_CHECKING:
    import torch


def pick_device(hints: Hints) -> torch.device:
    """The device `hints.device` names; auto takes CUDA where it is. Raises InputError."""
    import torch

    if hints.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if hints.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"hints.device={hints.device}, but torch sees no CUDA device here; use cpu or auto")
    try:
        device = torch.device(hints.device)
    except RuntimeError as e:
        raise InputError(f"hints.device={hints.device!r} is no device; use auto, cpu, cuda or cuda:N") from e
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        raise InputError(f"hints.device={hints.device}, but torch sees {there} here; use one of these, or auto")
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """A GPU as this thread's own: Triton launches on that one, whatever its tensors are on, and events are recorded there."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def fixed_state(key: str, hints: Hints) -> Iterator[None]:
    """Seeds from the key, deterministic operations and the request's threads; of what was set before, all but the seeds comes back."""
    # Read by cuBLAS when its first handle is made; without it deterministic matrix products only warn.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import numpy as np
    import torch
    from torch.utils import deterministic as memory

    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that writes every new tensor once more.
    memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if hints.threads is not None:
        torch.set_num_threads(hints.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class _Log(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full has no room for a log either. The stage tells that; Python's own answer is a traceback on the terminal."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def logged(folders: Sequence[Path]) -> Iterator[None]:
    """Python's logging of this process, warnings included, into log.txt of every folder."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in ("workers", "quant")]
    with ExitStack() as stack:
        # Not the root's level: libraries change it when they are imported.
        for logger in ours:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.INFO)
        for folder in folders:
            handler = _Log(folder / LOG, mode="a", encoding="utf-8", errors="backslashreplace")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            stack.callback(handler.close)
            stack.callback(root.removeHandler, handler)
            root.addHandler(handler)
        stack.callback(logging.captureWarnings, False)
        logging.captureWarnings(True)
        yield


def formatted(error: BaseException) -> str:
    """Traceback as text."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
