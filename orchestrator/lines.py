"""Lines for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

FEWEST_COLUMNS = 64
"""That tables are made for."""


def say(console: Console, line: str) -> None:
    """As it is: brackets in a path are no markup, and the width of a terminal breaks nothing that may be copied."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_table(console: Console, table: Table) -> None:
    """A narrower terminal breaks its lines: rich would leave out what has no room, digits of a number among it."""
    before = console.width
    if before >= FEWEST_COLUMNS:  # a width that was set no longer follows the terminal's
        console.print(table)
        return
    console.width = FEWEST_COLUMNS
    console.print(table)
    console.width = before
