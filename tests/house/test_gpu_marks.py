"""`make test-gpu` finds the tests that need a CUDA device by their mark, and runs the cheapest first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
OWN = """
import pytest
from conftest import NEEDS
@pytest.mark.gpu("triton")
def test_forms(): pass
def test_plain(): pass
@pytest.mark.gpu
def test_bare(): pass
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.gpu("nvcc"))])
def test_library(n): assert n == 1, "as it should"
"""


def run(folder: Path, *more: str) -> str:
    """pytest on a file of its own, with the suite's conftest.py and no CUDA device."""
    (folder / "test_own.py").write_text(OWN)
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(TESTS.parent / "pyproject.toml"),
        "--rootdir",
        str(folder),
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{folder}"}
    done = subprocess.run([*command, *more, str(folder)], env=environment, capture_output=True, text=True, check=False, cwd=folder)
    return done.stdout + done.stderr


def test_the_mark_selects_sorts_and_skips_with_a_reason(tmp_path: Path) -> None:
    said = run(tmp_path, "-m", "gpu", "-v", "-p", "no:xdist")
    assert re.findall(r"::(test_\w+(?:\[\d\])?) SKIPPED", said) == ["test_bare", "test_library[2]", "test_forms"], said
    assert "there is no CUDA device" in said
    assert "2 passed, 3 skipped" in run(tmp_path, "-p", "no:xdist")


def test_an_unknown_need_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text('import pytest\n@pytest.mark.gpu("rocm")\ndef test_it(): pass\n')
    assert "gpu('rocm'): choose one of nothing, nvcc, triton, stages" in run(tmp_path)


def test_failures_are_shown_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_fails.py").write_text("def test_a(): assert 1 == 2\ndef test_b(): pass\n")
    for more in (("-p", "no:xdist"), ("-n", "1")):
        said = run(tmp_path, "-v", "-p", "tests.at_once", *more)
        assert -1 < said.find("test_a failed in its call") < said.find("assert 1 == 2") < said.rfind("PASSED"), said


def test_no_test_asks_for_a_device_by_another_way() -> None:
    """Else `make test-gpu` would not run it. Peers of benchmarks take minutes to build."""
    asks = re.compile(r"skipif\(\s*not torch\.cuda\.is_available\(\)")
    found = {p.name for p in TESTS.rglob("test_*.py") if asks.search(p.read_text()) and "mark.gpu" not in p.read_text()}
    assert not found
