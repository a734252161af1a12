"""What MLflow lets a name or a value be. Longer values it would cut without a word; here the cut says so.

Limits of MLflow 3.17: keys 250 characters from `A-Z a-z 0-9 _ - . / : space`, param values 6000, tag values 8000.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 8000
_FORBIDDEN = re.compile(r"[^\w\-./: ]", re.ASCII)


def metric_name(*parts: str) -> str:
    """Parts joined by `/`; what MLflow refuses becomes `_` (also a slash or dots that would make another path)."""
    clean = [_FORBIDDEN.sub("_", p).replace("/", "_").strip() or "_" for p in parts]
    clean = ["_" * len(p) if p in (".", "..") else p for p in clean]
    return _cut_key(posixpath.join(*clean))


def tag_key(key: str) -> str:
    return _cut_key(_FORBIDDEN.sub("_", key))


def tag_value(value: Any) -> str:
    return _cut(str(value), TAG_LENGTH)


def param_value(value: Any) -> str:
    return _cut(str(value), PARAM_LENGTH)


def _cut(text: str, length: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # file names may be no UTF-8, which databases refuse
    if len(text) <= length:
        return text
    note = f" … (cut from {len(text)} characters)"
    return text[: length - len(note)] + note


def _cut_key(key: str) -> str:
    # The end of a key tells metrics of one task apart, so the middle goes.
    return key if len(key) <= KEY_LENGTH else key[: KEY_LENGTH // 2 - 2] + "____" + key[-(KEY_LENGTH // 2 - 2) :]
