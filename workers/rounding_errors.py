"""How far a rounded linear is from the given one, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workers.aside import number

PANELS = 8


@dataclass(frozen=True)
class Errors:
    """Read when they are wanted: a GPU may still be at work on them (`workers.aside`)."""

    distance: tuple[Tensor, Tensor]
    """||W' - W|| and ||W||, W' the stored weight with the scales taken back out; float64 `[]`."""
    loss: tuple[Tensor, Tensor] | None = None
    """tr(E H Eᵀ) and tr(W H Wᵀ), float64 `[]`; None without a Hessian."""

    @cached_property
    def weight(self) -> float:
        """||W' - W|| / ||W||; 0 where W is."""
        distance, norm = map(number, self.distance)
        return distance / norm if norm else 0.0

    @cached_property
    def output(self) -> float | None:
        """tr(E H Eᵀ) / tr(W H Wᵀ); None without a Hessian, or where nothing reached the input."""
        if self.loss is None:
            return None
        loss, whole = map(number, self.loss)
        return loss / whole if whole > 0 else None


def size(w: Tensor, h: Tensor) -> Tensor:
    """tr(w h wᵀ) `[]`. A weight's terms do not cancel as those of its errors do: on a GPU products of rounded operands (TF32) are exact
    enough, and take no time."""
    if not w.is_cuda:
        return in_quadratic_form(w, h)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        narrow = w.float()
        return ((narrow @ h.float()) * narrow).sum(dtype=torch.float64)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def in_quadratic_form(e: Tensor, h: Tensor) -> Tensor:
    """tr(e h eᵀ) `[]`, h symmetric: of its blocks of columns only those on and above the diagonal, (PANELS + 1) / (2 PANELS) of the
    products."""
    k = h.shape[0]
    step, total = -(-k // PANELS), e.new_zeros(())
    for first in range(0, k, step):
        end = min(first + step, k)
        part = (e[:, first:end] @ h[first:end, first:]) * e[:, first:]
        total += 2 * part.sum() - part[:, : end - first].sum()
    return total
