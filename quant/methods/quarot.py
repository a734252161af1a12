"""QuaRot (Ashkboos et al. 2024, arXiv 2404.00456): a rotated model computes the same and has no outlier channels.

Objective: none is minimised; a random rotation spreads every outlier over all channels. Norm scales are fused into the linears
behind them (in float64); the residual stream is rotated by a randomised Hadamard matrix Q = diag(±1) H / sqrt(hidden), every
head's values by a Hadamard matrix, folded into weights. At run time Hadamard matrices mix heads before the output projection
and channels before the second feed-forward linear (their inverse is folded into the weight), and queries and keys after RoPE.
Shapes: Q `[hidden, hidden]`, values `[head_dim, head_dim]`, float64.
Departures: embeddings lose their mean only where norms are LayerNorms (the reference code does it for every model, which changes
a model with RMS norms); norms keep the model's own eps (1e-5 in the code); where no Hadamard matrix of a size is known, blocks of
the largest power of two that divides it are used, and noted; the key rotation is idle unless keys are quantized.
Clip ratios are parts of the scheme (`activation.clip`, `kv.clip`; the paper's tables use 0.9 and 0.95).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.hadamard import apply_hadamard, hadamard_block
from quant.methods.base import ModelShape, Rotation, RotationLoss
from quant.parameters import Checked
from quant.scheme import Supports

FAMILIES = ("llama", "mistral", "qwen2", "opt")


@dataclass(frozen=True)
class Quarot(Checked):
    name: ClassVar[str] = "quarot"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = True
    for_activations: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports(bits=tuple(range(1, 9)), ragged_groups=True, families=FAMILIES)
    maps: ClassVar[frozenset[str]] = frozenset({"hessian", "samples"})
    working_set: ClassVar[str] = "block"
    searches: ClassVar[bool] = False

    online: bool = True
    """Mix heads before the output projection and channels before the second feed-forward linear, at run time."""
    qk: bool = True
    """Mix every head's channels in queries and keys after RoPE; idle unless keys are quantized."""

    def rotation(self, shape: ModelShape, generator: torch.Generator, loss: RotationLoss | None = None) -> Rotation:
        """Signs from the generator; nothing is searched."""
        notes: list[str] = []
        values = random_hadamard(shape.head_dim, "head_dim", notes, None)
        return Rotation(
            residual=random_hadamard(shape.hidden, "hidden", notes, generator),
            values=(values,) * shape.blocks,
            heads=block_of(shape.heads, "heads", notes) if self.online else 0,
            down=block_of(shape.inner, "inner", notes) if self.online else 0,
            keys=block_of(shape.head_dim, "head_dim", notes) if self.qk else 0,
            notes=list(dict.fromkeys(notes)),
        )


def block_of(size: int, what: str, notes: list[str]) -> int:
    """Values that one Hadamard matrix mixes: all `size` of them, or a part, which is noted."""
    block = hadamard_block(size)
    if block != size:
        notes.append(f"no Hadamard matrix of order {size} ({what}) is known: {size // block} blocks of {block} are mixed")
    return block


def random_hadamard(size: int, what: str, notes: list[str], generator: torch.Generator | None) -> Tensor:
    """diag(±1) H `[size, size]` orthonormal, float64; no signs without a generator."""
    block = block_of(size, what, notes)
    rows = torch.eye(size, dtype=torch.float64)
    if generator is not None:
        rows = rows * (2 * torch.randint(0, 2, (size, 1), generator=generator) - 1)
    return apply_hadamard(rows.view(size, -1, block)).view(size, size)
