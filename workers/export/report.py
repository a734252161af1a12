"""What an export says when it is done, and why one was refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workers.errors import WorkerError
from workers.request import ErrorClass


class ExportError(WorkerError):
    """A quantized model that the wanted format cannot hold, with the reason."""

    error_class = ErrorClass.USER


@dataclass(frozen=True)
class ExportReport:
    format: str
    out: str
    """The folder written."""
    linears: int
    """Quantized linears in it."""
    bytes: int
    """Of all files."""
    notes: tuple[str, ...] = ()
    """What differs from the model that was evaluated, in words."""


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
