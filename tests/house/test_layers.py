"""What planning shares with workers runs on the standard library alone, and the driver never loads torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    "workers.specs",
    "workers.families",
    "workers.rotatable",
    "workers.positions",
    "workers.request",
    "workers.artifact",
    "workers.errors",
    "workers.failures",
    "workers.kv_rules",
    "workers.machine",
    "workers.model_files",
    "workers.structure",
    "workers.toolkits.environments",
    "quant.scheme",
    "quant.parameters",
)


def run(code: str, *flags: str) -> str:
    """Output of `code` in a fresh interpreter that finds the project."""
    return subprocess.run(
        [sys.executable, *flags, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    ).stdout


@pytest.mark.parametrize("module", SHARED)
def test_shared_module_needs_the_standard_library_only(module: str) -> None:
    # -S leaves site-packages out, so any other import fails.
    run(f"import {module}", "-S")


def test_the_driver_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    modules = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in (ROOT / "orchestrator").rglob("*.py")
        if "ray" not in p.relative_to(ROOT).parts and p.name != "__main__.py"
    )
    loaded = json.loads(
        run(f"import importlib, json\nfor m in {modules!r}: importlib.import_module(m)\nprint(json.dumps(sorted(sys.modules)))")
    )
    assert set(modules) <= set(loaded)
    assert not {"torch", "transformers", "ray", "mlflow"} & set(loaded)


def test_files_that_the_architecture_names_are_there() -> None:
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)", (ROOT / "docs" / "architecture.md").read_text()))
    files = [p.relative_to(ROOT).as_posix() for folder in ("orchestrator", "workers", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert len(named) > 40
    assert [n for n in sorted(named) if not any(f.endswith(f"/{n}") or f == n for f in files)] == []
