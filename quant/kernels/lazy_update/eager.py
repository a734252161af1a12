"""By torch's product, a part at a time: libraries choose by the number of columns in which order they sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reach(block: int, device: torch.device) -> int:
    return block


SPAN = 512
"""Columns: with fewer, products over all columns before them are slower; with more, there is more to invert."""


def span(block: int, device: torch.device) -> int | None:
    return max(1, SPAN // block) * block if device.type == "cpu" else None


def lazy_update(later: Tensor, left: Tensor, right: Tensor, stack: Sequence[int] | None = None) -> None:
    if stack is None or len(stack) == 1:
        later.addmm_(left, right, alpha=-1)
        return
    for part, own in zip(torch.split(later, list(stack), dim=1), torch.split(right, list(stack), dim=1), strict=True):
        part.addmm_(left, own, alpha=-1)
