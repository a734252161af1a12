"""Learned rotations (after SpinQuant, Liu et al. 2024, arXiv 2405.16406, from its formulas alone).

Objective: the language model's cross-entropy on calibration text with activations and keys and values fake-quantized as the
scheme says (straight through rounding), in R1 of the residual stream `[hidden, hidden]` and R2 of every block's values
`[head_dim, head_dim]`, both orthonormal; descent by Cayley steps from a random Hadamard matrix. Both fold into weights; what is
left at run time is QuaRot's Hadamard matrix before the second feed-forward linear, and the one on queries and keys after RoPE.
Departures: no mean is taken off the embeddings of models with RMS norms; the iterate of least loss on the first `checked` batches
is used, the start included (the paper takes the last); one sequence a step; R1 and R2 are made orthonormal by QR before every check
and once more in float64 at the end, since five fixed-point steps leave an error. The search holds the whole model in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.cayley import cayley_step, orthonormal
from quant.errors import NonFiniteError
from quant.methods.base import ModelShape, Rotation, RotationLoss
from quant.methods.quarot import FAMILIES, block_of, random_hadamard
from quant.parameters import Checked
from quant.scheme import Supports


@dataclass(frozen=True)
class LearnedRotation(Checked):
    name: ClassVar[str] = "learned_rotation"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"activation", "kv", "text"})
    uses_seed: ClassVar[bool] = True
    for_activations: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports(bits=tuple(range(1, 9)), ragged_groups=True, families=FAMILIES)
    maps: ClassVar[frozenset[str]] = frozenset({"hessian", "samples"})
    working_set: ClassVar[str] = "model"
    searches: ClassVar[bool] = True

    steps: int = 100
    """Cayley steps, one sequence of calibration text each."""
    lr: float = 1.5
    """First step size; falls to 0 along half a cosine."""
    checked: int = 8
    """Sequences on which iterates are compared."""
    check_every: int = 10
    """Steps between comparisons."""
    weights: bool = False
    """Round weights to nearest in the search too, on the rounding's grid: for variants that round to nearest; GPTQ's are left at
    16 bits."""
    online: bool = True
    """Mix channels before the second feed-forward linear, at run time."""
    qk: bool = True
    """Mix every head's channels in queries and keys after RoPE; idle unless keys are quantized."""

    def rotation(self, shape: ModelShape, generator: torch.Generator, loss: RotationLoss | None = None) -> Rotation:
        """The best of the iterates, the start included. Raises ValueError without a loss, NonFiniteError for a start that has none."""
        if loss is None:
            raise ValueError("learned_rotation searches on calibration text: give the model's loss")
        notes: list[str] = []
        start = [random_hadamard(shape.hidden, "hidden", notes, generator).float()]
        start += [random_hadamard(shape.head_dim, "head_dim", notes, generator).float() for _ in range(shape.blocks)]
        down = block_of(shape.inner, "inner", notes) if self.online else 0
        keys = block_of(shape.head_dim, "head_dim", notes) if self.qk else 0

        def loss_of(matrices: Sequence[Tensor], i: int) -> Tensor:
            return loss(Rotation(matrices[0], tuple(matrices[1:]), down=down, keys=keys), i)

        best, losses, skipped = self._search(start, generator, loss_of)
        if skipped:
            notes.append(f"{skipped} steps of single matrices were left out: their gradient was not finite")
        least = min(losses)
        if least == losses[0]:
            notes.append(f"no step was better than the start (loss {losses[0]:.6g}): the random rotation is used")
        residual, *values = (orthonormal(r.double()) for r in best)
        return Rotation(
            residual=residual,
            values=tuple(values),
            down=down,
            keys=keys,
            notes=list(dict.fromkeys(notes)),
            details={"losses": losses, "check_every": self.check_every, "best": losses.index(least)},
        )

    def _search(
        self, start: list[Tensor], generator: torch.Generator, loss: Callable[[Sequence[Tensor], int], Tensor]
    ) -> tuple[list[Tensor], list[float], int]:
        """(best matrices, loss of the start and of every compared iterate, steps of a matrix left out). Raises NonFiniteError."""

        def compared(matrices: Sequence[Tensor]) -> float:
            with torch.no_grad():
                return sum(float(loss(matrices, i)) for i in range(self.checked)) / self.checked

        best, current, losses, skipped = start, start, [compared(start)], 0
        if not math.isfinite(losses[0]):
            raise NonFiniteError(
                f"the loss of the random rotation is {losses[0]}; the quantized model overflows: use model.dtype=float32 or more bits"
            )
        for step in range(self.steps):
            # As the paper's optimizer does: drift off the orthonormal matrices is mended now and then.
            if int(torch.randint(0, 101, (1,), generator=generator)) == 0:
                current = [orthonormal(r) for r in current]
            leaves = [r.detach().requires_grad_() for r in current]
            gradients = torch.autograd.grad(loss(leaves, step), leaves, allow_unused=True)
            lr = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            pairs = zip(current, gradients, strict=True)
            finite = [g is None or bool(torch.isfinite(g).all()) for g in gradients]
            skipped += finite.count(False)
            current = [cayley_step(r, g, lr) if g is not None and ok else r for (r, g), ok in zip(pairs, finite, strict=True)]
            if (step + 1) % self.check_every == 0 or step + 1 == self.steps:
                current = [orthonormal(r) for r in current]
                losses.append(compared(current))
                if losses[-1] < min(losses[:-1]):
                    best = current
        return best, losses, skipped
