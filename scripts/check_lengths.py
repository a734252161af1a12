"""Fail when a source file is too long to read in one go: more than 400 lines. A long file usually has a seam inside. And when a line of C++
is longer than 140 characters, as ruff has it for Python."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT, WIDTH = 400, 140
FOLDERS = ("conf", "orchestrator", "hydra_plugins", "workers", "quant", "tests", "bench", "scripts", "docker")
CPP = (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")
SUFFIXES = (".py", ".pyi", ".sh", ".js", ".css", ".yaml", *CPP)


def too_long(root: Path) -> list[str]:
    """`path: lines` of each source file above the limit, and `path:line: characters` of each line of C++ that is."""
    said = []
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        name, text = path.relative_to(root).as_posix(), path.read_bytes()
        if (count := text.count(b"\n")) > LIMIT:
            said.append(f"{name}: {count} lines, at most {LIMIT}")
        if path.suffix in CPP:
            wide = ((i, len(line)) for i, line in enumerate(text.decode().split("\n"), 1) if len(line) > WIDTH)
            said += [f"{name}:{i}: {width} characters, at most {WIDTH}" for i, width in wide]
    return said


if __name__ == "__main__":
    messages = too_long(Path(__file__).resolve().parents[1])
    for message in messages:
        print(message)
    sys.exit(bool(messages))
