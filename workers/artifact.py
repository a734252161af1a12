"""An artifact folder: payload/ and record.json with a digest per file and one of its own. Standard library only.

Layout: `spec.json`, `payload/`, `log.txt`, `record.json` (written last). Readers check digests the first time they open a
file and raise `CorruptArtifactError`, which the driver answers by setting the artifact aside.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

RECORD = "record.json"
PAYLOAD = "payload"
DIGEST = "digest"
"""Key of a record's own digest; what earlier versions wrote has none."""
THREADS = min(8, os.cpu_count() or 1)
"""That read or flush files side by side."""


class CorruptArtifactError(Exception):
    """A stored file is missing or its content differs from its recorded digest."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"artifact {key[:12]}: {reason}")
        self.key = key


def flush(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_flushed(staging: Path, folder: Path) -> None:
    """Rename a folder into place so that a crash of the machine leaves all of it or nothing."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(flush, (*staging.rglob("*"), staging)))
    staging.rename(folder)
    flush(folder.parent)


def share(folder: Path) -> None:
    """Give the folder and all below it the modes that the umask says: temporary folders and safetensors files are their owner's alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _chunked(f)


def _chunked(f: Any) -> str:
    h = hashlib.sha256()
    while chunk := f.read(1 << 20):
        h.update(chunk)
    return h.hexdigest()


def payload_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path ▸ {bytes, sha256} of every file under payload/, sorted."""
    root = folder / PAYLOAD
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    with ThreadPoolExecutor(THREADS) as pool:  # hashing leaves Python's lock
        digests = list(pool.map(file_digest, paths))
    return {p.relative_to(root).as_posix(): {"bytes": p.stat().st_size, "sha256": d} for p, d in zip(paths, digests, strict=True)}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, or another mapping of the store, with its own digest: a bit that flips in a score is found out as one in a tensor is."""
    written: dict[str, Any] = json.loads(json.dumps(record))  # keys that are numbers become text, which sorts otherwise
    return {**written, DIGEST: _own_digest(written)}


def is_as_written(record: Mapping[str, Any]) -> bool:
    """Whether its own digest, where it has one, is that of the rest."""
    return DIGEST not in record or record[DIGEST] == _own_digest(record)


def _own_digest(record: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in record.items() if name != DIGEST}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Raises CorruptArtifactError, also for a record that tells no files or is not the one that was written."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as e:
        raise CorruptArtifactError(folder.name, f"{RECORD} cannot be read ({e})") from e
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise CorruptArtifactError(folder.name, f"{RECORD} tells no files")
    if not is_as_written(record):
        raise CorruptArtifactError(folder.name, f"{RECORD} differs from its own digest")
    return record


def payload_path(folder: Path, name: str) -> Path:
    """Path of a payload file whose digest was checked. Raises CorruptArtifactError."""
    path = folder / PAYLOAD / name
    if not path.is_file():
        raise CorruptArtifactError(folder.name, f"payload file {name} is missing")
    stat = path.stat()
    _check(folder, name, stat.st_size, stat.st_mtime_ns)
    return path


def payload_digest(folder: Path, name: str) -> str:
    """SHA-256 of a payload file as its record has it; the file is not read. Raises CorruptArtifactError."""
    return str(_recorded(folder, name)["sha256"])


def _recorded(folder: Path, name: str) -> dict[str, Any]:
    recorded: dict[str, Any] | None = read_record(folder)["files"].get(name)
    if recorded is None:
        raise CorruptArtifactError(folder.name, f"payload file {name} is not in its record")
    return recorded


@lru_cache(maxsize=4096)
def _check(folder: Path, name: str, size: int, mtime_ns: int) -> None:
    expected = _recorded(folder, name)
    if size != expected["bytes"] or file_digest(folder / PAYLOAD / name) != expected["sha256"]:
        raise CorruptArtifactError(folder.name, f"payload file {name} differs from its recorded digest")
