"""Fail when a source file is too long to read in one go: more than 400 lines. A long file usually has a seam inside."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 400
FOLDERS = ("conf", "orchestrator", "hydra_plugins", "workers", "quant", "tests", "bench", "scripts", "docker")
SUFFIXES = (".py", ".pyi", ".sh", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".js", ".css", ".yaml")


def too_long(root: Path) -> list[str]:
    """`path: lines` of each source file above the limit."""
    paths = sorted(p for folder in FOLDERS for p in (root / folder).rglob("*") if p.suffix in SUFFIXES and p.is_file())
    lines = {p.relative_to(root).as_posix(): p.read_bytes().count(b"\n") for p in paths}
    return [f"{name}: {count} lines, at most {LIMIT}" for name, count in lines.items() if count > LIMIT]


if __name__ == "__main__":
    messages = too_long(Path(__file__).resolve().parents[1])
    for message in messages:
        print(message)
    sys.exit(bool(messages))
