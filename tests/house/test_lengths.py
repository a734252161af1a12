"""The file length check finds what is too long, and nothing else."""

from __future__ import annotations

import runpy
from pathlib import Path

CHECK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "check_lengths.py"))


def test_only_source_files_above_the_limit_are_named(tmp_path: Path) -> None:
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "long.py").write_text("x = 1\n" * (CHECK["LIMIT"] + 1))
    (tmp_path / "quant" / "fits.py").write_text("x = 1\n" * CHECK["LIMIT"])
    (tmp_path / "quant" / "data.json").write_text("1\n" * 1000)
    (tmp_path / "elsewhere.py").write_text("x = 1\n" * 1000)
    assert CHECK["too_long"](tmp_path) == [f"quant/long.py: {CHECK['LIMIT'] + 1} lines, at most {CHECK['LIMIT']}"]


def test_only_lines_of_cpp_above_the_width_are_named(tmp_path: Path) -> None:
    (tmp_path / "quant").mkdir()
    wide = "▸" * CHECK["WIDTH"]
    for name in ("a.cpp", "b.cu", "c.h", "d.py"):
        (tmp_path / "quant" / name).write_text(f"{wide}\n{wide}▸\n")
    assert CHECK["too_long"](tmp_path) == [f"quant/{name}:2: 141 characters, at most 140" for name in ("a.cpp", "b.cu", "c.h")]
