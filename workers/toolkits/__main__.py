"""`<environment>/bin/python -m workers.toolkits request.json [--outcomes FILE]`: one quantize stage, made by the environment's toolkit.

Requests, outcomes, seeds, threads, log and classes of failure are `workers.run_stage`'s. Ends with the process that started it,
which holds the other end of standard input.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from workers import run_stage
from workers.context import Context
from workers.errors import InputError
from workers.memory import PeakMemory
from workers.specs import QuantizeSpec
from workers.toolkits.environments import TOOLKITS
from workers.toolkits.job import Job, ResultWriter

ADAPTERS = {"hqq": "hqq_package", "llm_compressor": "llm_compressor", "auto_round": "auto_round"}
"""Toolkit ▸ module here with `quantize(job)`, which yields (name of the linear, its stored tensor)."""


def run_toolkit(spec: QuantizeSpec, inputs: Mapping[str, Path], payload: Path, context: Context) -> dict[str, Any]:
    """inputs: `job`, the folder of a written `Job`; payload: where results go. Returns the package, its release and the peak memory.

    Raises InputError for a package of another release, and whatever the toolkit raises."""
    job = Job.read(inputs["job"], context.device)
    toolkit = TOOLKITS[job.made.toolkit]
    found = metadata.version(toolkit.package)
    if found != job.made.release:
        raise InputError(
            f"{sys.prefix} holds {toolkit.package} {found}, and the method asks for {job.made.release}; install that release there, or set "
            f"method.rounding.params.release={found}"
        )
    peak = PeakMemory(context.device)
    writer = ResultWriter(payload)
    adapter = importlib.import_module(f"workers.toolkits.{ADAPTERS[toolkit.name]}")
    with context.phase("toolkit"):
        for name, rounded in adapter.quantize(job):
            writer.add(name, rounded)
    writer.close()
    context.notes += job.notes
    return {"toolkit": toolkit.name, "package": toolkit.package, "release": found, "peak_memory_bytes": peak.bytes()}


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage.main(argv, replace(run_stage.RUNNERS, quantize=run_toolkit))


def _end_with_parent() -> None:
    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main())
