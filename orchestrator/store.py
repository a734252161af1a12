"""The store: content-addressed artifacts, and the truth that MLflow, the report and the ledger are projections of.

    store.json                        format of the store
    objects/<kind>/<ab>/<key>/        spec.json, payload/, log.txt, record.json (written last)
    attempts/<key>/<n>.json           one per failed attempt: error class, message, log tail
    sweeps/<key>/                     plan.json, started.json, report.html, table.csv, table.parquet
    staging/                          unfinished work; emptied by the next driver
    corrupt/                          artifacts set aside, never read again

A commit writes everything into a sibling folder, flushes it to disk and renames it: a reader sees all of an artifact or nothing,
and the first writer wins. JSON, Parquet and safetensors only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import StoreError, StoreVersionError
from orchestrator.fingerprint import identity
from orchestrator.stage import Stage
from workers.artifact import (
    PAYLOAD,
    RECORD,
    CorruptArtifactError,
    is_as_written,
    payload_files,
    payload_path,
    read_record,
    rename_flushed,
    sealed,
)
from workers.failures import DISK_FULL, MAKE_ROOM
from workers.request import Failure, Outcome
from workers.specs import StageKind

FORMAT = 1
TOLD = ("sweep", "started", "ended", "summary")
"""Of every record, beside its files; read of whatever is committed."""
ATTEMPT = ("sweep", "final", "error_class", "type", "message", "log_tail")
"""Of every failed attempt."""
FOLDERS = ("objects", "attempts", "sweeps", "staging")
CHECKED_BYTES = 16 * 2**20
TENSORS = ".safetensors"
"""Weights and reference log-probabilities are large: reading them would cost a finished sweep more than planning it."""
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
"""No rename takes the place of a folder with files in it."""


def usual_place() -> Path:
    """The folder of the store for commands that name none."""
    return Path(os.environ.get("BITGRID_STORE", "bitgrid-store"))


class Store:
    """A folder on a local or shared POSIX file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, create: bool = True) -> Store:
        """Check the format, or create an empty store. Raises StoreVersionError for a store of a newer bitgrid, StoreError."""
        if self._is_there():
            return self
        if not create:
            raise StoreError(f"there is no store at {self.root}; run a sweep first, or name the folder of an existing one: --store FOLDER")
        self._refuse_other()
        try:
            for name in FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            write_json(self._marker, {"format": FORMAT})
        except OSError as e:
            raise StoreError(f"the store {self.root} cannot be created: {e}; set store= to a folder that can be written") from e
        return self

    def check(self) -> None:
        """Raises what `open` would for what stands in its place, and creates nothing."""
        if not self._is_there():
            self._refuse_other()

    @property
    def _marker(self) -> Path:
        return self.root / "store.json"

    def _is_there(self) -> bool:
        """Raises StoreVersionError, StoreError."""
        # A copy that was cut off may hold artifacts and not yet the marker.
        if not self._marker.is_file() and not any((self.root / "objects").glob(f"*/*/*/{RECORD}")):
            return False
        found = _format(self._marker)
        if found > FORMAT:
            raise StoreVersionError(
                f"the store {self.root} has format {found}, this bitgrid reads up to {FORMAT}; "
                "use the newer bitgrid that wrote it, or another store="
            )
        return True

    def _refuse_other(self) -> None:
        new = all(_is_new(p) for p in self.root.iterdir()) if self.root.is_dir() else not os.path.lexists(self.root)
        if not new:
            raise StoreError(f"{self.root} is neither an empty folder nor a bitgrid store; set store= to a new folder")

    def folder(self, kind: StageKind, key: str) -> Path:
        return self.root / "objects" / kind.value / key[:2] / key

    def has(self, kind: StageKind, key: str) -> bool:
        return (self.folder(kind, key) / RECORD).is_file()

    def is_whole(self, kind: StageKind, key: str) -> bool:
        """Whether the files of a committed artifact are what its record says: all by their size, tables and texts by their content.

        The content of tensors and of other large files is left to who reads them.
        """
        folder = self.folder(kind, key)
        try:
            for name, file in self.record(kind, key)["files"].items():
                path = folder / PAYLOAD / name
                if not path.is_file() or path.stat().st_size != file["bytes"]:
                    return False
                if file["bytes"] <= CHECKED_BYTES and not name.endswith(TENSORS):
                    payload_path(folder, name)
        except CorruptArtifactError:
            return False
        return True

    def record(self, kind: StageKind, key: str) -> dict[str, Any]:
        """Raises workers.artifact.CorruptArtifactError."""
        record = read_record(self.folder(kind, key))
        lacking = [name for name in TOLD if name not in record]
        if lacking:
            raise CorruptArtifactError(key, f"{RECORD} lacks {', '.join(lacking)}")
        return record

    def records(self, kind: StageKind) -> Iterator[Path]:
        """Folders of all committed artifacts of a kind."""
        for path in sorted((self.root / "objects" / kind.value).glob(f"*/*/{RECORD}")):
            yield path.parent

    def new_staging(self, key: str) -> Path:
        folder = self.root / "staging" / f"{key}.{uuid.uuid4().hex[:8]}"
        (folder / PAYLOAD).mkdir(parents=True)
        return folder

    def staged(self) -> set[str]:
        """Keys of stages that are under way: those of the driver that holds the lease, where one does."""
        return {p.name.partition(".")[0] for p in (self.root / "staging").glob("*.*")}

    def clear_staging(self) -> None:
        """Remove what earlier drivers left unfinished; for the holder of the lease only, before anything else.

        Moved aside first: a worker of such a driver, on another host, may still write there, and would keep its folder from going.
        """
        with contextlib.suppress(FileNotFoundError):
            (self.root / "staging").rename(self.root / f"staging.{uuid.uuid4().hex[:8]}")
        (self.root / "staging").mkdir(exist_ok=True)
        for aside in self.root.glob("staging.*"):
            shutil.rmtree(aside, ignore_errors=True)

    def commit(self, stage: Stage, outcome: Outcome, staging: Path, attempt: int, sweep: str) -> dict[str, Any]:
        """Turn a staging folder into an artifact. Raises OSError (disk full); the staging folder is then removed."""
        assert outcome.record is not None
        final = self.folder(stage.kind, stage.key)
        record = {
            "format": FORMAT,
            "key": stage.key,
            "kind": stage.kind.value,
            "label": stage.label,
            "sweep": sweep,
            "attempt": attempt,
            "inputs": dict(stage.inputs),
            **outcome.record,
        }
        try:
            record["files"] = payload_files(staging)
            write_json(staging / "spec.json", identity(stage.kind, stage.spec, stage.inputs))
            record = sealed(record)
            write_json(staging / RECORD, record)
            final.parent.mkdir(parents=True, exist_ok=True)
            if not self.has(stage.kind, stage.key) and self._placed(staging, stage):
                return record
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(staging)
        return self.record(stage.kind, stage.key)

    def _placed(self, staging: Path, stage: Stage) -> bool:
        """Whether the folder is the artifact now; False where another writer's came meanwhile."""
        final = self.folder(stage.kind, stage.key)
        try:
            rename_flushed(staging, final)
        except OSError as e:
            if e.errno not in OCCUPIED:
                raise
            if self.has(stage.kind, stage.key):
                return False
            # A folder without a record is no artifact: the rest of one whose commit another host was killed in.
            shutil.rmtree(final, ignore_errors=True)
            rename_flushed(staging, final)
        return True

    def set_aside(self, kind: StageKind, key: str) -> Path:
        """Move a corrupt artifact out of the way; its stage will run again."""
        target = self.root / "corrupt" / f"{kind.value}-{key}-{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        os.rename(self.folder(kind, key), target)
        return target

    def add_attempt(self, key: str, failure: Failure, attempt: int, sweep: str, final: bool) -> None:
        """`final`: it was not tried again, so the stage has failed."""
        folder = self.root / "attempts" / key
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.stem) for p in _numbered(folder)), default=0)
        content = {
            "attempt": attempt,
            "sweep": sweep,
            "ended": time.time(),
            "final": final,
            "error_class": failure.error_class.value,
            "type": failure.type,
            "message": failure.message,
            "log_tail": failure.log_tail,
        }
        write_json(folder / f"{number}.json", sealed(content))

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """Failed attempts, oldest first. One that cannot be read is passed over: at worst its stage counts as one that has not run."""
        found = []
        for path in _numbered(self.root / "attempts" / key):
            with contextlib.suppress(StoreError):
                found.append(read_json(path, "remove it", ATTEMPT))
        return found

    def sweep_folder(self, sweep: str) -> Path:
        return self.root / "sweeps" / sweep

    def sweep_keys(self) -> list[str]:
        """Sweeps of the store, the latest started first."""
        starts = [p for p in (self.root / "sweeps").glob("*/started.json") if (p.parent / "plan.json").is_file()]
        return [p.parent.name for p in sorted(starts, key=_started, reverse=True)]


def _numbered(folder: Path) -> list[Path]:
    """Failed attempts by number; not what others put beside them, as systems that copy files do (`._1.json`)."""
    return sorted((p for p in folder.glob("*.json") if p.stem.isdecimal()), key=lambda p: int(p.stem))


def _started(path: Path) -> tuple[float, int]:
    """What the file says: a copied store has files of one time. The file's own time where it says nothing, and between equals."""
    changed = path.stat().st_mtime_ns
    try:
        return float(json.loads(path.read_text())["started"]), changed
    except (ValueError, KeyError, TypeError):
        return changed / 1e9, changed


def read_json(path: Path, remedy: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping that a driver wrote, with these keys. Raises StoreError, which ends with `remedy`, where it cannot be read as one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise StoreError(f"{path} cannot be read: {e}; {remedy}") from e
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds no mapping; {remedy}")
    lacking = [key for key in keys if key not in content]
    if lacking:
        raise StoreError(f"{path} lacks {', '.join(lacking)}; {remedy}")
    if not is_as_written(content):
        raise StoreError(f"{path} is not what was written: it differs from its own digest; {remedy}")
    return content


def _is_new(entry: Path) -> bool:
    """Whether it is of a store whose creation goes on beside, or was cut off before `store.json` was there."""
    if entry.name in FOLDERS:
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name.startswith(".store.json.")


def _format(marker: Path) -> int:
    try:
        found = json.loads(marker.read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        found = f"{type(e).__name__}: {e}"
    if not isinstance(found, int) or isinstance(found, bool):
        raise StoreError(
            f'{marker} does not say the store\'s format ({found}); if this is a store, write {{"format": {FORMAT}}} into it, '
            "else set store= to another folder"
        )
    return found


@contextmanager
def full_disk_told(root: Path) -> Iterator[None]:
    """A full disk raises StoreError, with what to do."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as e:
        if getattr(e, "errno", None) in DISK_FULL or (isinstance(e, sqlite3.OperationalError) and "full" in str(e)):
            raise StoreError(f"the disk of {root} is full: {e}; {MAKE_ROOM}") from e
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write beside, flush, rename."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with draft.open("w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    draft.replace(path)
