"""Figures of a benchmark that goes on: a run that is cut off leaves all that it had."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def keep(path: Path | None, figures: Any) -> None:
    """Writes them as JSON in place of what was there; a reader finds one or the other whole. Nothing where there is no path."""
    if path is None:
        return
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(figures, indent=1) + "\n")
    draft.replace(path)


def commit() -> str | None:
    """Of the code that runs, marked where files differ from it; None where git does not tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
