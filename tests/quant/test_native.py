"""A library is kept under a name made from all that it is made of."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from quant.kernels import native
from quant.kernels.native import kept_library


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes its arguments into the file after -o, and a line into `calls`; fails with -DFAIL, and takes half a second with -DSLOW."""
    monkeypatch.setenv("BITGRID_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "compiler"
    path.write_text(
        f'#!/bin/sh\necho x >> {tmp_path}/calls\ncase "$*" in *-DFAIL*) echo no such thing >&2; exit 1;; *-DSLOW*) sleep 0.5;; esac\n'
        'while [ "$1" != -o ]; do shift; done\necho made > "$2"\n'
    )
    path.chmod(0o755)
    return path


def test_what_is_included_counts_and_nothing_else(tmp_path: Path, compiler: Path) -> None:
    source = tmp_path / "some.cpp"
    source.write_text('#include <vector>\n#include "one.h"\n')
    (tmp_path / "one.h").write_text('#pragma once\n#  include "two.h"\n')
    (tmp_path / "two.h").write_text('#include "one.h"\nint two;\n')
    (tmp_path / "other.h").write_text("int other;\n")

    def made(version: str = "1", *flags: str) -> Path:
        return kept_library(source, str(compiler), version, flags, ((),))

    first = made()
    (tmp_path / "other.h").write_text("int another;\n")
    assert made() == first
    assert (tmp_path / "calls").read_text() == "x\n", "kept, not made again"
    names = {first, made("2"), made("1", "-O1")}
    (tmp_path / "two.h").write_text('#include "one.h"\nint three;\n')
    names.add(made())
    source.write_text(source.read_text() + "int more;\n")
    names.add(made())
    assert len(names) == 5


def test_flags_are_tried_one_after_another_and_the_last_message_is_told(tmp_path: Path, compiler: Path) -> None:
    source = tmp_path / "some.cpp"
    source.write_text("int x;\n")
    assert kept_library(source, str(compiler), "1", (), (("-DFAIL",), ())).read_text() == "made\n"
    with pytest.raises(RuntimeError, match="no such thing"):
        kept_library(source, str(compiler), "2", (), (("-DFAIL",), ("-DFAIL=2",)))
    assert [p.suffix for p in (tmp_path / "cache" / "kernels").iterdir()] == [".so"], "nothing half made is left"


def source_of(folder: Path) -> Path:
    source = folder / "some.cpp"
    source.write_text("int x;\n")
    return source


def builds(source: Path, compiler: Path) -> Path:
    return kept_library(source, str(compiler), "1", ("-DSLOW",), ((),))


@pytest.mark.skipif(
    (sys.platform, sys.byteorder) != ("linux", "little") or sys.maxsize < 2**32, reason="libraries are not ELF of 64 bits here"
)
def test_a_library_without_its_end_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITGRID_CACHE", str(tmp_path / "cache"))
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    source = tmp_path / "some.cpp"
    source.write_text('extern "C" int some() { return 7; }\n')

    def made() -> Path:
        return kept_library(source, compiler, "1", ("-shared", "-fPIC"), ((),))

    path = made()
    whole, first = path.read_bytes(), path.stat().st_ino
    assert made().stat().st_ino == first
    for length in (0, 10, 63, 64, len(whole) // 2, len(whole) - 1):
        # Another file: the kept one may be in use.
        path.unlink()
        path.write_bytes(whole[:length])
        assert made().read_bytes() == whole


@pytest.fixture
def locks() -> None:
    pytest.importorskip("fcntl", reason="files are locked by fcntl here")


@pytest.mark.usefixtures("locks")
def test_one_of_several_at_once_builds(tmp_path: Path, compiler: Path) -> None:
    """Threads stand for processes: a lock belongs to the file that was opened, not to who opened it."""
    source = source_of(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: builds(source, compiler), range(4)))
    assert {p.read_text() for p in found} == {"made\n"}
    assert (tmp_path / "calls").read_text() == "x\n"
    assert [p.suffix for p in (tmp_path / "cache" / "kernels").iterdir()] == [".so"]


@pytest.mark.usefixtures("locks")
def test_each_tries_where_building_fails(tmp_path: Path, compiler: Path) -> None:
    def fails(_: int) -> None:
        with pytest.raises(RuntimeError, match="no such thing"):
            kept_library(source, str(compiler), "1", (), (("-DFAIL",),))

    source = source_of(tmp_path)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(fails, range(3)))
    assert (tmp_path / "calls").read_text() == 3 * "x\n"
    assert not list((tmp_path / "cache" / "kernels").iterdir())


@pytest.mark.usefixtures("locks")
def test_a_builder_that_is_killed_stands_in_nobodys_way(tmp_path: Path, compiler: Path) -> None:
    source = source_of(tmp_path)
    builder = multiprocessing.get_context("fork").Process(target=builds, args=(source, compiler))
    builder.start()
    calls = tmp_path / "calls"
    while not calls.exists():
        time.sleep(0.01)
    assert builder.pid is not None
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert list((tmp_path / "cache" / "kernels").glob("*.lock")), "it held the lock"
    assert builds(source, compiler).read_text() == "made\n"
    assert calls.read_text() == 2 * "x\n"


@pytest.mark.usefixtures("locks")
def test_nobody_waits_for_ever(tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    source = source_of(tmp_path)
    path = builds(source, compiler)
    path.unlink()
    monkeypatch.setattr(native, "LONGEST", 2)
    with path.with_suffix(".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert builds(source, compiler) == path
    assert path.exists()
    assert path.with_suffix(".lock").exists(), "another's lock stays"


def test_a_compiler_that_takes_too_long_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers start processes of their own, as g++ does cc1plus, which went on when the driver was killed."""
    monkeypatch.setenv("BITGRID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "LONGEST", 1)
    driver, beat = tmp_path / "driver", tmp_path / "beat"
    driver.write_text(f"#!/bin/sh\n(while :; do date +%N > {beat}; sleep 0.05; done) &\necho $! > {tmp_path}/child\nwait\n")
    driver.chmod(0o755)
    start = time.monotonic()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            kept_library(source_of(tmp_path), str(driver), "1", (), ((), ("-DMORE",)))
        assert time.monotonic() - start < 20
        last = beat.read_text()
        time.sleep(0.5)
        assert beat.read_text() == last, "its child runs on"
    finally:
        with suppress(ProcessLookupError):
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert not list((tmp_path / "cache" / "kernels").glob("*.so"))


@pytest.mark.parametrize("error", [None, OSError("no locks here")])
def test_a_library_is_built_where_files_cannot_be_locked(
    error: OSError | None, tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        assert error is not None
        raise error

    if error is None:
        monkeypatch.setattr(native, "fcntl", None)
    else:
        monkeypatch.setattr(native.fcntl, "flock", flock)
    assert builds(source_of(tmp_path), compiler).read_text() == "made\n"
