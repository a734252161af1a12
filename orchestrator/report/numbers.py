"""How numbers are written: enough digits to carry what is known, and no more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone

MINUS = "−"


def _sign(text: str) -> str:
    return text.replace("-", MINUS)


def number(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, plain up to a million: 87.2, 1234, 0.0123, 4.5e+07, ∞."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return _sign("-∞" if value < 0 else "∞")
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return _sign(f"{value:.{digits - 1}e}")
    return fixed(value, max(0, digits - 1 - exponent(value)))


def exponent(value: float) -> int:
    """Of the leading decimal digit; 0 for zero."""
    return math.floor(math.log10(abs(value))) if value else 0


def fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return _sign(text.lstrip("-") if not text.strip("-0.") else text)  # no minus before a rounded zero


def decimals_for(delta: float, low: float, high: float) -> int | None:
    """Decimals that show an interval's half width with one digit (two where the first is 1); None: use an exponent."""
    half = (high - low) / 2
    if not (math.isfinite(half) and half > 0):
        half = abs(delta) / 50 or 0.01
    places = -exponent(half) + (1 if half / 10 ** exponent(half) < 2 else 0)
    largest = max(abs(x) for x in (delta, low, high) if math.isfinite(x))
    return None if largest >= 1e6 or places > 6 else max(0, places)


def signed(value: float, decimals: int | None) -> str:
    """`+2.0`, `−0.3`, `0.00`, with an exponent where `decimals` is None."""
    text = number(value, 2) if decimals is None or not math.isfinite(value) else fixed(value, decimals)
    return text if text.startswith(MINUS) or not value > 0 or not text.strip("0.") else f"+{text}"


def interval(low: float, high: float, decimals: int | None) -> str:
    """`[1.8, 2.3]`; empty where there is none."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return "[" + ", ".join(number(x, 2) if decimals is None or not math.isfinite(x) else fixed(x, decimals) for x in (low, high)) + "]"


def size(count: float | None) -> str:
    """Bytes in decimal units: 12.9 MB."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} TB"


def size_unit(largest: float) -> tuple[float, str]:
    """Divisor and unit for an axis that reaches `largest` bytes."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= divisor:
            return divisor, unit
    return 1.0, "B"


def bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def bits_span(values: Sequence[float]) -> str:
    """`2.25`, or from the least to the most: `2.25 to 2.50`."""
    return " to ".join(dict.fromkeys(bits(v) for v in (min(values), max(values)))) if values else bits(None)


def count(n: int, word: str) -> str:
    """`1 score`, `32 scores`."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
