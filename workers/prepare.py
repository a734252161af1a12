"""The prepare stage: a search whose small result several quantize stages reuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from workers import sensitivity
from workers.context import Context
from workers.errors import InputError
from workers.specs import PrepareSpec

KINDS: dict[str, ModuleType] = {module.KIND: module for module in (sensitivity,)}


def run_prepare(spec: PrepareSpec, inputs: Mapping[str, Path], payload: Path, context: Context) -> dict[str, Any]:
    """inputs by role; payload: existing empty folder. Returns the summary. Raises InputError."""
    if spec.kind not in KINDS:
        raise InputError(f"prepare kind {spec.kind!r}; allowed: {', '.join(sorted(KINDS))}")
    module = KINDS[spec.kind]
    if spec.version != module.VERSION:
        raise InputError(
            f"prepare {spec.kind} version {spec.version} is asked for, this worker has version {module.VERSION}; "
            "driver and workers must run the same bitgrid"
        )
    result: dict[str, Any] = module.run(spec, inputs, payload, context)
    return result
