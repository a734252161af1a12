"""One driver per store: a lease file with the holder's host, process and expiry.

Taken by an exclusive create. A holder whose process is gone on this host is replaced at once, one on another host or in another
container after its lease has expired; a second live driver is refused with the holder's name. A thread renews the lease while it is held.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from orchestrator.errors import StoreError, StoreLockedError
from workers.failures import DISK_FULL, MAKE_ROOM

LEASE_S = 60.0
RENEW_S = 10.0
SAME_START_S = 1.5
"""Linux tells the time of the boot in whole seconds, and one reading may be a second beside the next."""
_KEYS = {"token", "host", "pid", "process_started", "purpose", "since", "expires"}


class Lease:
    """Context manager; raises StoreLockedError when another live driver holds the store, StoreError where it cannot be written."""

    def __init__(self, path: Path, purpose: str) -> None:
        self._path = path
        self._purpose = purpose
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.lost = threading.Event()
        """Set when somebody else took the lease over: the store is theirs, and this driver must end."""

    def __enter__(self) -> Lease:
        while not self._created():
            try:
                holder = _read(self._path)
            except FileNotFoundError:
                continue  # it was released meanwhile
            except OSError as e:
                raise StoreLockedError(f"{self._path} cannot be read ({e}), which names the driver of the store; use another store=") from e
            if holder is not None and _alive(holder):
                raise StoreLockedError(
                    f"the store {self._path.parent} is in use by {holder['purpose']} on {holder['host']} (process {holder['pid']}, since "
                    f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(holder['since']))}); wait for it, stop it, or use another store="
                )
            self._set_aside()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._released.set()
        self._thread.join()  # or it would put the file back
        try:
            holder = _read(self._path)
        except OSError:
            return
        if holder is not None and holder["token"] == self._token:
            self._path.unlink(missing_ok=True)

    def _content(self) -> dict[str, Any]:
        me = psutil.Process()
        return {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": me.pid,
            "process_started": _started(me),
            "boot": _boot(),
            "processes": _processes(),
            "purpose": self._purpose,
            "since": time.time(),
            "expires": time.time() + LEASE_S,
        }

    def _created(self) -> bool:
        try:
            return self._try_create()
        except OSError as e:
            remedy = MAKE_ROOM if e.errno in DISK_FULL else "make it writable, or use another store="
            raise StoreError(f"the store {self._path.parent} cannot be written: {e}; {remedy}") from e

    def _try_create(self) -> bool:
        # Written beside and linked, so that nobody ever reads half a lease.
        draft = self._path.with_name(f"{self._path.name}.{self._token}")
        try:
            draft.write_text(json.dumps(self._content()))
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _set_aside(self) -> None:
        """Take a dead holder's file away. A rename succeeds for one of several takers only."""
        stale = self._path.with_name(f"{self._path.name}.stale.{self._token}")
        try:
            self._path.rename(stale)
        except FileNotFoundError:
            return
        try:
            holder = _read(stale)
            if holder is not None and _alive(holder):
                # Another taker was quicker, and this is its lease; where yet another has made a new one, that one holds.
                with contextlib.suppress(FileExistsError):
                    os.link(stale, self._path)
        finally:
            stale.unlink()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                holder = json.loads(self._path.read_text())
                if holder["token"] == self._token:
                    draft = self._path.with_name(f"{self._path.name}.{self._token}")
                    draft.write_text(json.dumps({**holder, "expires": time.time() + LEASE_S}))
                    draft.replace(self._path)
                    continue
            except FileNotFoundError:
                pass
            except (OSError, ValueError):
                continue  # a full disk, a file server that is away: tried again
            self.lost.set()
            return


def _started(process: psutil.Process) -> float:
    """When a process started, in seconds that a clock set anew does not change: on Linux since boot.

    psutil adds the time of the boot there, which is the clock's of now less the time since then.
    """
    return float(process.create_time()) - (float(psutil.boot_time()) if psutil.LINUX else 0.0)


def _boot() -> str | None:
    """Names the boot since which processes count; None where the system has no such name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _processes() -> str | None:
    """Names the numbering of processes that this one sees: each container has its own, also where it has the host's name. None where the
    system has no such name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def holder(path: Path) -> str | None:
    """The live driver that holds a lease file, for people."""
    try:
        content = _read(path)
    except OSError:
        return None
    return f"{content['purpose']} on {content['host']}, process {content['pid']}" if content is not None and _alive(content) else None


def _read(path: Path) -> dict[str, Any] | None:
    """Content of a lease file, None where it is no such thing. Raises OSError."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.keys() >= _KEYS else None


def _alive(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return bool(holder["expires"] > time.time())
    if holder.get("boot", _boot()) != _boot():
        return False
    if holder.get("processes", _processes()) != _processes():
        return bool(holder["expires"] > time.time())  # its number is another process here, or none
    try:
        process = psutil.Process(holder["pid"])
        # Leases of earlier versions name no boot, and tell the start by the clock.
        started = _started(process) if "boot" in holder else process.create_time()
        return bool(abs(started - holder["process_started"]) < SAME_START_S)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
