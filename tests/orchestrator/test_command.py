"""The command that a sweep's last lines name is one that can be typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orchestrator import verbs
from orchestrator.cli import main
from orchestrator.command import call, program
from tests.orchestrator.sweeping import bitgrid


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment's bin folder below the working folder, not on PATH."""
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "bitgrid").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    return bin_folder


def test_environment_that_is_not_active_is_named_by_path(environment: Path) -> None:
    assert program() == ".venv/bin/bitgrid"


def test_path_is_whole_from_elsewhere(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program() == str(environment / "bitgrid")


def test_active_environment_needs_the_name_alone(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(environment))
    assert program() == "bitgrid"


def test_bitgrid_that_is_not_installed_is_called_as_a_module(environment: Path) -> None:
    (environment / "bitgrid").unlink()
    assert program() == f"{sys.executable} -m orchestrator.cli"


def test_a_store_is_named_where_the_verbs_would_look_elsewhere(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITGRID_STORE", raising=False)
    other = tmp_path / "another store"
    assert call("ui", tmp_path / "bitgrid-store") == ".venv/bin/bitgrid ui"
    assert call("resume ab", other) == f".venv/bin/bitgrid resume ab --store '{other}'"
    monkeypatch.setenv("BITGRID_STORE", str(other))
    assert call("resume ab", other) == ".venv/bin/bitgrid resume ab"


@pytest.mark.parametrize("verb", ["ui", "reconcile"])
def test_a_sweep_whose_name_begins_like_the_group_is_no_override(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, object]] = []

    def called(store: Path, sweep: str | None, overrides: list[str], *rest: object) -> int:
        given.append((sweep, overrides))
        return 0

    monkeypatch.setattr(verbs, verb, called)
    assert main([verb, "tracking-error", "tracking=mlflow", "tracking.experiment=e"]) == 0
    assert given == [("tracking-error", ["tracking=mlflow", "tracking.experiment=e"])]


@pytest.mark.parametrize(
    "given", [["-m", "--cfg", "job"], ["--multirun", "-c=job"], ["-m", "-c", "job"], ["--cfg=job", "--info"], ["-r", "-m"]]
)
def test_one_of_hydras_modes_is_taken(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "method=rtn", *given]) == 2
    assert "Hydra takes one of them" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--package", "task"], ["-p=task"], ["--resolve"], ["--resolve", "--info", "config"]])
def test_what_hydra_would_pass_over_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It ran the cell in place of showing a part of it, or ended in a traceback."""
    assert main(["run", "method=rtn", *given]) == 2
    assert f"{given[0]} is for what --cfg shows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["--cfg", "job", "method=gtpq"], ["-c", "job", "method=gtpq"], ["--info=searchpath", "method=gtpq"], ["--help", "metod=gtpq"]]
)
def test_what_cannot_be_shown_is_wrong_input(given: list[str], tmp_path: Path) -> None:
    done = bitgrid(tmp_path, "run", *given)
    assert done.returncode == 2
    assert given[-1].partition("=")[2] in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    assert bitgrid(tmp_path, "run", "--cfg", "job", "--package", "method", "--resolve").returncode == 0


@pytest.mark.parametrize("verb", ["run", "plan", "explain"])
@pytest.mark.parametrize("given", [["--store", "s"], ["--store=s"]])
def test_verbs_that_plan_say_how_they_take_the_store(verb: str, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The flag is that of all other verbs."""
    assert main([verb, "-m", "method=rtn", *given]) == 2
    assert "run, plan and explain take the store as a setting: store=FOLDER" in capsys.readouterr().err
