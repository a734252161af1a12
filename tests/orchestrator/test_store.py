"""The store: all of an artifact or nothing, first writer wins, one driver."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import lease
from orchestrator.errors import StoreError, StoreLockedError, StoreVersionError
from orchestrator.fingerprint import stage_key
from orchestrator.lease import Lease, holder
from orchestrator.stage import Stage
from orchestrator.store import Store
from workers.artifact import CorruptArtifactError, payload_path
from workers.request import ErrorClass, Failure, Outcome
from workers.specs import EvaluateSpec, ModelSpec, StageKind, TaskSpec, TextSpec


def a_stage(digest: str = "m") -> Stage:
    spec = EvaluateSpec(ModelSpec(digest), TaskSpec("perplexity", 1, TextSpec("t")))
    return Stage(stage_key(StageKind.EVALUATE, spec, {}), StageKind.EVALUATE, spec, "evaluate m unquantized t")


def an_outcome(stage: Stage) -> Outcome:
    times = {"started": 1.0, "ended": 2.0, "seconds": {}}
    return Outcome(stage.key, {**times, "environment": {}, "notes": [], "summary": {"scores": {"ppl": 3.0}}})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store").open()


def commit(store: Store, stage: Stage, content: bytes = b"rows") -> Path:
    staging = store.new_staging(stage.key)
    (staging / "payload" / "items.parquet").write_bytes(content)
    store.commit(stage, an_outcome(stage), staging, 1, "sweep")
    return store.folder(stage.kind, stage.key)


def test_committed_artifact_is_whole_and_its_record_tells_its_files(store: Store) -> None:
    stage = a_stage()
    assert not store.has(stage.kind, stage.key)
    folder = commit(store, stage)
    record = store.record(stage.kind, stage.key)
    assert record["files"]["items.parquet"]["bytes"] == 4
    assert json.loads((folder / "spec.json").read_text())["kind"] == "evaluate"
    assert payload_path(folder, "items.parquet").read_bytes() == b"rows"
    assert list((store.root / "staging").iterdir()) == []


def test_first_writer_wins(store: Store) -> None:
    stage = a_stage()
    commit(store, stage, b"first")
    folder = commit(store, stage, b"second")
    assert (folder / "payload" / "items.parquet").read_bytes() == b"first"


def test_a_writer_whose_artifact_another_one_commits_while_it_flushes_its_own_has_that_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, staging = a_stage(), store.new_staging(a_stage().key)
    (staging / "payload" / "items.parquet").write_bytes(b"second")
    rename = Path.rename

    def late(draft: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        commit(store, stage, b"first")
        return rename(draft, target)

    monkeypatch.setattr(Path, "rename", late)
    assert store.commit(stage, an_outcome(stage), staging, 1, "other sweep")["sweep"] == "sweep"
    assert payload_path(store.folder(stage.kind, stage.key), "items.parquet").read_bytes() == b"first"
    assert list((store.root / "staging").iterdir()) == []


def test_the_rest_of_a_commit_that_was_cut_off_makes_way(store: Store) -> None:
    rest = store.folder(a_stage().kind, a_stage().key) / "payload"
    rest.mkdir(parents=True)
    (rest / "items.parquet").write_bytes(b"ro")
    assert payload_path(commit(store, a_stage()), "items.parquet").read_bytes() == b"rows"


def test_full_disk_leaves_no_half_artifact(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = a_stage()
    staging = store.new_staging(stage.key)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        store.commit(stage, an_outcome(stage), staging, 1, "sweep")
    assert not store.has(stage.kind, stage.key)
    assert list((store.root / "staging").iterdir()) == []


def test_a_worker_of_a_dead_driver_that_still_writes_keeps_no_staging_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rmdir = store.new_staging("0123"), os.rmdir

    def meanwhile(path: Any, **more: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            (folder / "payload" / "late").write_text("of a worker on another host")
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", meanwhile)
    store.clear_staging()
    assert store.staged() == set()
    assert [p.name for p in store.root.glob("staging*")] == ["staging"]


def test_changed_payload_is_told_as_corrupt_and_set_aside(store: Store) -> None:
    stage = a_stage()
    folder = commit(store, stage)
    (folder / "payload" / "items.parquet").write_bytes(b"rowz")
    with pytest.raises(CorruptArtifactError):
        payload_path(folder, "items.parquet")
    store.set_aside(stage.kind, stage.key)
    assert not store.has(stage.kind, stage.key)


def test_attempts_are_kept_in_order(store: Store) -> None:
    """As numbers: the tenth is not the second."""
    for n in range(1, 12):
        store.add_attempt("k", Failure(ErrorClass.USER, "ValueError", f"no {n}"), n, "sweep", final=n == 11)
    assert [(a["message"], a["final"]) for a in store.attempts("k")] == [(f"no {n}", n == 11) for n in range(1, 12)]


@pytest.mark.parametrize(("name", "content"), [("1.json", ""), ("1.json", "[]"), ("1.json", "{}"), ("._1.json", "x"), ("of me.json", "{}")])
def test_an_attempt_that_cannot_be_read_hides_no_other(store: Store, name: str, content: str) -> None:
    (store.root / "attempts" / "k").mkdir()
    (store.root / "attempts" / "k" / name).write_text(content)
    assert store.attempts("k") == []
    for n in (1, 2):
        store.add_attempt("k", Failure(ErrorClass.USER, "ValueError", f"no {n}"), n, "sweep", True)
    assert [a["message"] for a in store.attempts("k")] == ["no 1", "no 2"]


def test_store_of_a_newer_version_is_refused(store: Store) -> None:
    (store.root / "store.json").write_text('{"format": 99}')
    with pytest.raises(StoreVersionError, match="99"):
        store.open()


def test_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match="neither an empty folder"):
        Store(tmp_path).open()


def test_a_store_whose_creation_was_cut_off_is_made_whole(tmp_path: Path) -> None:
    for name in ("objects", "attempts"):
        (tmp_path / name).mkdir()
    (tmp_path / ".store.json.0a1b2c3d").touch()  # the draft of a marker
    store = Store(tmp_path).open()
    assert commit(store, a_stage()).is_dir()
    (tmp_path / "store.json").unlink()
    with pytest.raises(StoreError, match="into it, else set store="):  # what is in it may be somebody's
        Store(tmp_path).open()


@pytest.mark.parametrize("create", [True, False])
def test_a_store_without_its_marker_is_told_with_the_marker_to_write(store: Store, create: bool) -> None:
    """As a copy that was cut off leaves it."""
    commit(store, a_stage())
    marker = store.root / "store.json"
    content = json.loads(marker.read_text())
    marker.unlink()
    with pytest.raises(StoreError, match="if this is a store, write") as told:
        store.open(create)
    assert str(marker) in str(told.value)
    assert json.dumps(content) in str(told.value)


def test_second_live_driver_is_refused_with_the_holders_name(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with Lease(path, "bitgrid run"):
        assert str(os.getpid()) in (holder(path) or "")
        with pytest.raises(StoreLockedError, match=str(os.getpid())), Lease(path, "other"):
            pass
    assert not path.exists()


def test_a_lease_that_is_held_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds it goes on, and all but the expiry stays as it was."""
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    path = tmp_path / "lease.json"
    with Lease(path, "mine") as held:
        before = now = json.loads(path.read_text())
        while now["expires"] == before["expires"] and not held.lost.is_set():
            now = json.loads(path.read_text())
        assert not held.lost.is_set()
        assert now["expires"] > before["expires"]
        assert {**now, "expires": before["expires"]} == before
    assert list(tmp_path.iterdir()) == []


def _hold(path: Path) -> None:
    with Lease(path, "doomed"):
        time.sleep(60)


def test_lease_of_a_killed_driver_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(path,))
    process.start()
    while not path.exists():
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Lease(path, "next"):
        assert "next" in (holder(path) or "")


def test_lease_on_another_host_is_respected_until_it_expires(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    content = {"token": "x", "host": "elsewhere", "pid": 1, "process_started": 0.0, "purpose": "bitgrid run", "since": 0.0}
    path.write_text(json.dumps({**content, "expires": time.time() + 60}))
    with pytest.raises(StoreLockedError, match="elsewhere"), Lease(path, "mine"):
        pass
    path.write_text(json.dumps({**content, "expires": time.time() - 1}))
    with Lease(path, "mine"):
        pass


def test_lease_in_another_container_is_respected_until_it_expires(tmp_path: Path) -> None:
    """Containers may have the host's name, and see no process of each other."""
    path = tmp_path / "lease.json"
    with Lease(path, "theirs"):
        content = json.loads(path.read_text())
    for expires, free in ((time.time() + 60, False), (time.time() - 1, True)):
        path.write_text(json.dumps({**content, "pid": 2**22 + 1, "processes": "pid:[1]", "expires": expires}))
        assert (holder(path) is None) is free
        with contextlib.nullcontext() if free else pytest.raises(StoreLockedError, match="in use by theirs"), Lease(path, "mine"):
            pass


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere the start of a process is told as it was")
@pytest.mark.parametrize("step_s", [-7200.0, 3.0])
def test_a_clock_that_was_set_leaves_a_live_driver_its_store(step_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease.json"
    with Lease(path, "bitgrid run"):
        # Linux takes the time of the boot from the clock, so that every process seems to have started at another time.
        boot = psutil.boot_time()
        monkeypatch.setattr(psutil, "boot_time", lambda: boot + step_s)
        monkeypatch.setattr("psutil._psplatform.boot_time", lambda: boot + step_s)
        with pytest.raises(StoreLockedError, match=str(os.getpid())), Lease(path, "other"):
            pass
        # After another boot the same number is another process.
        monkeypatch.setattr("orchestrator.lease._boot", lambda: "another")
        assert holder(path) is None


@pytest.mark.parametrize(("number", "said"), [(errno.EROFS, "another store="), (errno.ENOSPC, "make free space")])
def test_a_store_that_cannot_be_written_is_told(number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StoreError, match=f"cannot be written: .*{said}"), Lease(tmp_path / "lease.json", "mine"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"token": "x"}', "not json"])
def test_a_damaged_lease_is_nobodys(content: str, tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text(content)
    assert holder(path) is None
    with Lease(path, "mine"):
        assert "mine" in (holder(path) or "")


def hold(path: Path, purpose: str, **changes: Any) -> None:
    """Write a lease of this process, as another driver would."""
    me = psutil.Process()
    content = {"token": purpose, "host": socket.gethostname(), "pid": me.pid, "process_started": me.create_time(), "purpose": purpose}
    path.write_text(json.dumps({**content, "since": 0.0, "expires": time.time() + 60, **changes}))


def after_the_first_read(monkeypatch: pytest.MonkeyPatch, path: Path, act: Callable[[], object]) -> None:
    """Another driver acts once a taker has looked at the lease and before it does anything about what it saw."""
    read, seen = Path.read_text, []

    def reading(self: Path, *args: Any, **kwargs: Any) -> str:
        try:
            return read(self, *args, **kwargs)
        finally:
            if self == path and not seen:
                seen.append(self)
                act()

    monkeypatch.setattr(Path, "read_text", reading)


def refused(path: Path, holder: str) -> None:
    with pytest.raises(StoreLockedError, match=f"in use by {holder} on"), Lease(path, "mine"):
        pass
    assert json.loads(path.read_text())["purpose"] == holder
    assert list(path.parent.iterdir()) == [path]


def test_a_lease_taken_just_after_the_last_was_released_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease.json"
    hold(path, "first")
    link = os.link

    def released_meanwhile(source: Path, target: Path) -> None:
        try:
            link(source, target)
        finally:
            path.unlink(missing_ok=True)

    with monkeypatch.context() as releasing:
        after_the_first_read(releasing, path, lambda: (hold(path, "second"), releasing.setattr(os, "link", link)))
        releasing.setattr(os, "link", released_meanwhile)
        refused(path, "second")


@pytest.mark.parametrize("before", ["dead", "no lease at all"])
def test_a_lease_taken_over_between_look_and_rename_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    path = tmp_path / "lease.json"
    if before == "dead":
        hold(path, "first", process_started=0.0)
    else:
        path.write_text("{")
    after_the_first_read(monkeypatch, path, lambda: hold(path, "second"))
    refused(path, "second")


def test_a_third_taker_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease.json"
    hold(path, "first", process_started=0.0)
    link = os.link

    def third(source: Path, target: Path) -> None:
        if ".stale." in Path(source).name:
            hold(path, "third")
        link(source, target)

    after_the_first_read(monkeypatch, path, lambda: hold(path, "second"))
    monkeypatch.setattr(os, "link", third)
    refused(path, "third")
