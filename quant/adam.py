"""Adam (Kingma & Ba 2014, arXiv 1412.6980) without weight decay: what torch.optim.AdamW(weight_decay=0) computes.

torch's own optimizers import its compiler on first use, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """Over groups of (parameters, learning rate)."""

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        self._groups = [(list(p), lr, [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p]) for p, lr in groups]
        self._steps = 0

    def zero_grad(self) -> None:
        for parameters, *_ in self._groups:
            for p in parameters:
                p.grad = None

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """share: of the learning rates, for schedules."""
        self._steps += 1
        first, second = (1 - b**self._steps for b in BETAS)
        for parameters, lr, means, squares in self._groups:
            for p, mean, square in zip(parameters, means, squares, strict=True):
                if p.grad is None:
                    continue
                mean.lerp_(p.grad, 1 - BETAS[0])
                square.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
                p.addcdiv_(mean, (square.sqrt() / second**0.5).add_(EPSILON), value=-lr * share / first)
