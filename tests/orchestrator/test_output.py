"""Where standard output goes away, a sweep goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.orchestrator.sweeping import ROOT, committed, overrides

PROGRAM = """
import sys
from orchestrator import run
from orchestrator.cli import main
from orchestrator.executors.in_process import InProcessExecutor
from tests.orchestrator.small_stages import small_stage

run.open_executor = lambda settings: InProcessExecutor(runner=small_stage)
sys.exit(main(sys.argv[1:]))
"""
STAGES = 3
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full answers as a full disk does")


def bitgrid(out: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A verb whose standard output is a file descriptor; small stages."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    call = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(call, env=given, stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=120)


def run(out: int, store: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return bitgrid(out, "run", "-m", *overrides(store, "method=rtn"), **environment)


def nobody_reads() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def closed_terminal() -> int:
    leader, follower = os.openpty()
    os.close(leader)
    return follower


@pytest.mark.parametrize("gone", [nobody_reads, closed_terminal, pytest.param(lambda: os.open(FULL, os.O_WRONLY), marks=needs_full)])
def test_a_sweep_whose_output_goes_away_is_finished_all_the_same(gone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = gone()
    done = run(out, tmp_path / "store")
    os.close(out)
    assert done.returncode == 0, done.stderr
    assert len(committed(tmp_path / "store")) == STAGES
    assert list((tmp_path / "store").glob("sweeps/*/report.html"))
    assert "Traceback" not in done.stderr


def test_a_reader_that_wants_no_more_is_no_failure(tmp_path: Path) -> None:
    assert run(subprocess.DEVNULL, tmp_path / "store").returncode == 0
    for arguments in (["report", "--store", str(tmp_path / "store")], ["--help"], ["report", "--help"]):
        out = nobody_reads()
        done = bitgrid(out, *arguments)
        os.close(out)
        assert (done.returncode, done.stderr) == (0, "")


@needs_full
def test_what_could_not_be_said_is_told_where_it_was_all_that_was_wanted(tmp_path: Path) -> None:
    assert run(subprocess.DEVNULL, tmp_path / "store").returncode == 0
    for arguments in (["report", "--store", str(tmp_path / "store")], ["--help"]):
        out = os.open(FULL, os.O_WRONLY)
        done = bitgrid(out, *arguments)
        os.close(out)
        assert done.returncode == 1
        assert done.stderr.startswith("bitgrid: not all could be written to standard output: [Errno 28]")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_the_table_s_characters_gets_others(encoding: str, tmp_path: Path) -> None:
    with (tmp_path / "said").open("wb") as f:
        done = run(f.fileno(), tmp_path / "store", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    said = (tmp_path / "said").read_bytes().decode(encoding)
    assert "2 scores: 2 done." in said
    assert "report: " in said


def test_the_locale_posix_gets_other_characters(tmp_path: Path) -> None:
    """There Python escapes what is no UTF-8, and nothing else."""
    with (tmp_path / "said").open("wb") as f:
        done = run(f.fileno(), tmp_path / "store", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 scores: 2 done." in (tmp_path / "said").read_bytes().decode("ascii")


def test_streams_are_the_caller_s_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    assert main(["--version"]) == 0
    assert main(["nonsense"]) == 2
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out.startswith("bitgrid ")
    assert "nonsense" in err
