"""A finished or partial sweep as people read it: a table in the terminal, and one HTML page with CSV and Parquet.

Everything here reads a `SweepResult` and nothing else; the same result gives the same bytes.
"""

from __future__ import annotations

from orchestrator.report.html import SCHEMA, ReportFiles, write_report
from orchestrator.report.terminal import print_table

__all__ = ["SCHEMA", "ReportFiles", "print_table", "write_report"]
