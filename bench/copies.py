"""Inputs in memory of their own, for benchmarks that read them from memory rather than from a cache."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def copied(weight: Any) -> Any:
    """In memory of its own."""
    if isinstance(weight, tuple):
        return tuple(copied(w) for w in weight)
    if isinstance(weight, Tensor):
        return weight.clone()
    if is_dataclass(weight) and not isinstance(weight, type):
        return replace(weight, **{f.name: copied(getattr(weight, f.name)) for f in fields(weight)})
    return weight
