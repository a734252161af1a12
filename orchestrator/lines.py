"""Lines for people."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, line: str) -> None:
    """As it is: brackets in a path are no markup, and the width of a terminal breaks nothing that may be copied."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
