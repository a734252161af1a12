"""A library is kept under a name made from all that it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.kernels.native import kept_library


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes its arguments into the file after -o, and a line into `calls`; fails with -DFAIL."""
    monkeypatch.setenv("BITGRID_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "compiler"
    path.write_text(
        f'#!/bin/sh\necho x >> {tmp_path}/calls\ncase "$*" in *-DFAIL*) echo no such thing >&2; exit 1;; esac\n'
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
