"""Statistics of a linear's input, how they are collected, and the maps that carry them through transforms.

Collecting is per sequence, in the order given, so that the result does not depend on how sequences were batched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.kernels import kernel


@dataclass
class Statistics:
    """Of one input with K channels. Fields that were not collected are None."""

    hessian: Tensor | None = None
    """`[K, K]` float32: (2 / sequences) x sum over tokens of x xᵀ (GPTQ)."""
    absmax: Tensor | None = None
    """`[K]` float32: max over tokens of |x|."""
    absmean: Tensor | None = None
    """`[K]` float32: mean over tokens of |x|."""
    minmax: Tensor | None = None
    """`[2, K]` float32: min and max over tokens of x."""
    samples: Tensor | None = None
    """`[S, T, K]`: inputs of whole sequences, for losses on a module's output."""

    def scaled(self, s: Tensor) -> Statistics:
        """Statistics of x / s, exactly: H ▸ S⁻¹ H S⁻¹, absmax, absmean, minmax and samples ▸ /s. s is `[K]` > 0."""
        return Statistics(
            hessian=None if self.hessian is None else self.hessian / s[:, None] / s[None, :],
            absmax=None if self.absmax is None else self.absmax / s,
            absmean=None if self.absmean is None else self.absmean / s,
            minmax=None if self.minmax is None else self.minmax / s,
            samples=None if self.samples is None else self.samples / s,
        )

    def mapped(self, f: Callable[[Tensor], Tensor]) -> Statistics:
        """Statistics of f(x) = x M, f a linear map of the last axis, exactly: H ▸ Mᵀ H M, samples ▸ f(samples). Computed in
        float64. absmax, absmean and minmax do not follow from those of x: None."""
        h, samples = self.hessian, self.samples
        return Statistics(
            hessian=None if h is None else f(f(h.double()).T).T.to(h).contiguous(),
            samples=None if samples is None else f(samples.double()).to(samples),
        )

    def shifted(self, z: Tensor) -> Statistics:
        """Statistics of x - z, z `[K]`: minmax and samples exactly, absmax from minmax. The others need more than they hold of x:
        None."""
        minmax = None if self.minmax is None else self.minmax - z
        return Statistics(
            absmax=None if minmax is None or self.absmax is None else minmax.abs().amax(0),
            minmax=minmax,
            samples=None if self.samples is None else self.samples - z.to(self.samples),
        )

    def require(self, method: str, *kinds: str) -> None:
        """Raises ValueError naming the statistics of `kinds` that are missing."""
        missing = [k for k in kinds if getattr(self, k) is None]
        if missing:
            raise ValueError(f"{method} needs the statistic {', '.join(missing)}, which was not given; collect it from the inputs first")


class Accumulator(Protocol):
    """Collects one statistic of an input."""

    def update(self, x: Tensor) -> None:
        """Tokens `[S, T, K]`, or `[T, K]` as one sequence; any float type."""

    def value(self) -> Tensor: ...


def _sequences(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 2 else x


class HessianSum:
    """The raw sum of x xᵀ in float32, scaled by 2 / sequences once at the end. Inputs nobody reached have H = 0.

    Where the kernel is faster with many tokens at once (its `CHUNK`), sequences wait until there are as many, counted from the first:
    how they were batched changes nothing."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(channels, channels, device=device)
        self.sequences = 0
        self._syrk = kernel("hessian_syrk", device=device, channels=channels).run
        self._chunk: int = getattr(self._syrk, "CHUNK", 0)
        self._waiting: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        sequences = _sequences(x)
        self.sequences += sequences.shape[0]
        if not self._chunk:
            self._syrk.add(self.total, sequences)
            return
        for sequence in sequences:
            self._waiting.append(sequence)
            if sum(len(s) for s in self._waiting) >= self._chunk:
                self._add_waiting()

    def _add_waiting(self) -> None:
        if self._waiting:
            self._syrk.add(self.total, torch.cat(self._waiting)[None])
            self._waiting = []

    def value(self) -> Tensor:
        self._add_waiting()
        found: Tensor = self._syrk.finished(self.total)
        return found * (2 / max(self.sequences, 1))


class AbsMax:
    def __init__(self, channels: int, device: torch.device | str) -> None:
        self.peak = torch.zeros(channels, device=device)

    def update(self, x: Tensor) -> None:
        if x.numel():
            self.peak = torch.maximum(self.peak, x.reshape(-1, x.shape[-1]).abs().amax(0).to(self.peak))

    def value(self) -> Tensor:
        return self.peak


class MinMax:
    """Zero and zero for inputs that nobody reached."""

    def __init__(self, channels: int, device: torch.device | str) -> None:
        self.limits = torch.zeros(2, channels, device=device)
        self.seen = False

    def update(self, x: Tensor) -> None:
        if x.numel():
            tokens = x.reshape(-1, x.shape[-1])
            found = torch.stack([tokens.amin(0), tokens.amax(0)]).to(self.limits)
            if self.seen:
                found = torch.stack([torch.minimum(found[0], self.limits[0]), torch.maximum(found[1], self.limits[1])])
            self.limits, self.seen = found, True

    def value(self) -> Tensor:
        return self.limits


class AbsMean:
    """Summed in float64."""

    def __init__(self, channels: int, device: torch.device | str) -> None:
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        for tokens in _sequences(x):
            self.total += tokens.to(self.total.device).abs().sum(0, dtype=torch.float64)
            self.tokens += tokens.shape[0]

    def value(self) -> Tensor:
        return (self.total / max(self.tokens, 1)).float()


class Samples:
    """Keeps sequences as they are, in their own float type. All sequences must be equally long."""

    def __init__(self, channels: int, device: torch.device | str) -> None:
        self.channels, self.device = channels, device
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.kept.append(_sequences(x).detach().to(self.device, copy=True))

    def value(self) -> Tensor:
        return torch.cat(self.kept) if self.kept else torch.zeros(0, 0, self.channels, device=self.device)


ACCUMULATORS: dict[str, Callable[[int, torch.device | str], Accumulator]] = {
    "hessian": HessianSum,
    "absmax": AbsMax,
    "absmean": AbsMean,
    "minmax": MinMax,
    "samples": Samples,
}
KINDS = tuple(ACCUMULATORS)


def accumulator(kind: str, channels: int, device: torch.device | str = "cpu") -> Accumulator:
    """A fresh accumulator. Raises ValueError for an unknown statistic."""
    if kind not in ACCUMULATORS:
        raise ValueError(f"statistic {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    return ACCUMULATORS[kind](channels, device)


def collect(inputs: Tensor, kinds: frozenset[str]) -> Statistics:
    """Statistics of inputs `[S, T, K]`, or `[T, K]` as one sequence."""
    found: dict[str, Tensor] = {}
    for kind in sorted(kinds):
        a = accumulator(kind, inputs.shape[-1], inputs.device)
        a.update(inputs)
        found[kind] = a.value()
    return Statistics(**found)
