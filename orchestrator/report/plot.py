"""Pieces of Plotly specifications that all figures of the report share.

Colours are set here for data only; the page gives text, grid and background the colours of the reader's light or dark theme.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46", "#7570B3")
"""Okabe and Ito's palette, told apart with any colour vision, plus two."""
GREY = "#8a8f98"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
WIDE = 10.0
"""A range of scores above this ratio gets a logarithmic axis."""


@dataclass(frozen=True)
class Figure:
    id: str
    title: str
    caption: str
    spec: dict[str, Any]


def scatter(x: Sequence[float], y: Sequence[float], name: str, **more: Any) -> dict[str, Any]:
    hover = {"hoverinfo": "text"} if "hovertext" in more else {}
    return {"type": "scatter", "x": list(x), "y": list(y), "name": safe(name), **hover, **more}


def plot_layout(x: str, y: str) -> dict[str, Any]:
    """The page adds height, legend and colours that fit the reader's screen."""
    return {
        "margin": {"l": 64, "r": 16, "t": 28, "b": 48},
        "xaxis": {"title": {"text": safe(x), "standoff": 12}, "automargin": True},
        "yaxis": {"title": {"text": safe(y), "standoff": 12}, "automargin": True},
        "hovermode": "closest",
        "shapes": [],
    }


def choose_scale(layout: dict[str, Any], values: Sequence[float]) -> None:
    if is_wide(values):
        layout["yaxis"] |= log_axis(values)


def is_wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > WIDE


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Ticks at powers of ten over a wide range, at 1, 2 and 5 over a smaller one, Plotly's own over less than half a decade."""
    ratio = max(values) / min(values)
    ticks = {"dtick": 1} if ratio > 1000 else {"dtick": "D2"} if ratio > 3 else {}
    return {"type": "log", "exponentformat": "power", **ticks}


def short(value: float) -> float:
    """Four significant digits: what a curve can show, and a fifth of the bytes."""
    return float(f"{value:.4g}")


def safe(text: str) -> str:
    """Plotly reads tags in its texts."""
    return html.escape(str(text), quote=False)
