"""Optional shared test data: real texts and small real models. Tests skip with a reason where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_path(*parts: str) -> Path:
    """Path inside the shared test data (`BITGRID_SHARED`, or `shared` beside the checkout); skips the test without it."""
    root = Path(os.environ.get("BITGRID_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"optional shared test data {'/'.join(parts)} is not here; set BITGRID_SHARED to its folder")
    return path
