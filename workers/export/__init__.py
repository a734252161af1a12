"""Quantized models in the checkpoint formats of other tools. `python -m workers.export` is the same for callers without torch."""

from __future__ import annotations

from workers.export.report import ExportError, ExportReport
from workers.export.run import FORMATS, check_format, run

__all__ = ["FORMATS", "ExportError", "ExportReport", "check_format", "run"]
