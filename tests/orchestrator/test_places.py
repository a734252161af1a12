"""Folders that cannot be: addresses, unknown homes, links to themselves, what is somebody else's or was removed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.orchestrator.sweeping import bitgrid, overrides, sweep
from tests.orchestrator.test_bad_input import TINY, exit_code
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["store=s3://bucket/store"], ["store=s3://bucket/store is an address", "mounted"]),
        (["store=file:///tmp/store"], ["store=file:///tmp/store is an address"]),
        (["store='~nobody-here/store'"], ["store=~nobody-here/store", "no home of ~nobody-here is known"]),
        (["store=a_file"], ["a_file is neither an empty folder nor a bitgrid store"]),
        (["store=loop"], ["loop is neither an empty folder nor a bitgrid store"]),
        (["models_dir='~nobody-here/m'"], ["models_dir=~nobody-here/m is not a folder"]),
        (["model.path='~nobody-here/m'"], ["~nobody-here/m is not a folder"]),
        (["calibration.text.path='~nobody-here/t'"], ["~nobody-here/t is not a file"]),
    ],
)
def test_a_folder_that_cannot_be_is_refused_and_nothing_is_made(
    arguments: list[str], said: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("no folder")
    (tmp_path / "loop").symlink_to("loop")
    for verb in ("run", "plan"):
        assert exit_code(verb, "-m", *overrides(tmp_path / "store", "method=gptq", *arguments)) == 2
        shown = capfd.readouterr().err
        assert all(word in shown for word in said), shown
        assert "Traceback" not in shown
    assert {p.name for p in tmp_path.iterdir()} <= {"a_file", "loop", "store"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "--store", "s3://bucket"], "--store s3:/bucket is an address"),
        (["status", "--store", "~nobody-here/store"], "no home of ~nobody-here is known"),
        (["report", "--store", "loop"], "there is no store at"),
        (["export", "SWEEP", "VARIANT", "--store", "loop/store", "--out", "out"], "there is no store at"),
    ],
)
def test_a_store_that_cannot_be_is_told_by_verbs_on_a_sweep(
    arguments: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert exit_code(*arguments) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("verb", ["run", "plan", "status"])
def test_a_store_of_somebody_else_is_told(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, look = tmp_path / "store", Path.is_file

    def refused(path: Path) -> bool:
        """As a folder answers that this user may not enter; root may enter any."""
        if path.is_relative_to(store):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_file", refused)
    assert exit_code(*([verb, "-m", *overrides(store, "method=rtn")] if verb != "status" else [verb, "--store", str(store)])) == 2
    shown = capfd.readouterr().err
    assert f"Permission denied: '{store / 'store.json'}'; let its owner give you access" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("verb", ["run", "plan", "status", "ui"])
def test_a_folder_that_was_removed_below_the_command_is_told(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert exit_code(verb) == 2
    assert "cd to one that is there" in capfd.readouterr().err


def test_python_without_docstrings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    done = bitgrid(tmp_path, "plan")
    assert done.returncode == 2
    assert "PYTHONOPTIMIZE" in done.stderr


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_a_store_is_said_by_the_umask(mask: int, tmp_path: Path) -> None:
    """A file of safetensors is made for its owner alone."""
    before = os.umask(mask)
    try:
        assert sweep(tmp_path / "store", "method=gptq", f"model.path={tiny_model('llama')}", *TINY).exit_code == 0
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "store" / "objects").rglob("*") if p.is_file()]
    assert any(p.suffix == ".safetensors" for p in files)
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~mask}
