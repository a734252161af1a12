"""Where a sweep was started from: versions, commit, machine. Recorded, never identity."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.machine import releases

_PACKAGES = ("bitgrid", "torch", "transformers", "datasets", "hydra-core", "omegaconf", "ray", "mlflow", "numpy", "safetensors")


def collect(overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "overrides": list(overrides),
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": releases(_PACKAGES),
    }


def _git() -> dict[str, Any] | None:
    """Commit of bitgrid's own checkout; None when it is installed without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return {"commit": _ask_git(root, "rev-parse", "HEAD"), "dirty": bool(_ask_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _ask_git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
