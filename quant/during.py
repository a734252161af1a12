"""Context variables that are set for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def during(variable: ContextVar[Any], value: T) -> Iterator[T]:
    """In this thread, and in those that run in copies of its context."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
