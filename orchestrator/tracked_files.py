"""Artifacts of a run: configuration, small tables, and records that point to large files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.results import StageResult
from workers.artifact import file_digest

TABLE_SUFFIXES = (".parquet", ".json", ".csv", ".txt")
LARGEST_TABLE = 8 * 2**20
"""Bytes. Above it only the record is logged: uploads through a tracking server are slow and time out."""


@dataclass(frozen=True)
class ArtifactFile:
    path: str
    """In the run, with `/`."""
    sha256: str
    source: Path | None = None
    """A file to copy, or"""
    content: bytes = b""
    """the bytes themselves."""


def config_file(path: str, value: Mapping[str, Any]) -> ArtifactFile:
    import yaml

    return _of_bytes(path, yaml.safe_dump(_plain(value), sort_keys=True, allow_unicode=True, width=140).encode())


def given_files(attachments: Mapping[str, Path]) -> list[ArtifactFile]:
    return [ArtifactFile(p, file_digest(f), source=f) for p, f in sorted(attachments.items()) if f.is_file()]


def stage_files(role: str, stage: StageResult) -> list[ArtifactFile]:
    """Small tables of a committed stage, and its record: where it lies in the store, and size and digest of every file it holds."""
    if stage.record is None:
        return []
    files: dict[str, dict[str, Any]] = stage.record.get("files", {})
    folder = role.replace(".", "/", 1)
    out = []
    for name, known in sorted(files.items()):
        source = None if stage.payload is None else stage.payload / name
        if source is not None and name.endswith(TABLE_SUFFIXES) and known["bytes"] <= LARGEST_TABLE and source.is_file():
            out.append(ArtifactFile(f"tables/{folder}/{name}", known["sha256"], source=source))
    described = {"store_path": f"objects/{stage.kind}/{stage.key[:2]}/{stage.key}", "record": stage.record}
    out.append(_of_bytes(f"stages/{folder}.json", (json.dumps(described, indent=1, sort_keys=True) + "\n").encode()))
    return out


def _of_bytes(path: str, content: bytes) -> ArtifactFile:
    return ArtifactFile(path, hashlib.sha256(content).hexdigest(), content=content)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
