"""Statistics of a linear's input, and the maps that carry them through transforms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Statistics:
    """Of one input with K channels. Fields that were not collected are None."""

    hessian: Tensor | None = None
    """`[K, K]` float32: (2 / sequences) x sum over tokens of x xᵀ (GPTQ)."""
    absmax: Tensor | None = None
    """`[K]` float32: max over tokens of |x|."""
    absmean: Tensor | None = None
    """`[K]` float32: mean over tokens of |x|."""
    samples: Tensor | None = None
    """`[S, T, K]`: inputs of whole sequences, for losses on a module's output."""

    def scaled(self, s: Tensor) -> Statistics:
        """Statistics of x / s, exactly: H ▸ S⁻¹ H S⁻¹, absmax ▸ /s, absmean ▸ /s, samples ▸ /s. s is `[K]` > 0."""
        return Statistics(
            hessian=None if self.hessian is None else self.hessian / s[:, None] / s[None, :],
            absmax=None if self.absmax is None else self.absmax / s,
            absmean=None if self.absmean is None else self.absmean / s,
            samples=None if self.samples is None else self.samples / s,
        )
