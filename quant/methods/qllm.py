"""QLLM's channel reassembly (Liu et al. 2023, arXiv 2310.08041, section 4.1 and 4.2): outliers of activations are spread over channels.

Objective, for each input of linears: min over θ of MSE(f(x; W), f(q(R_θ x); Q(R_θ W))), R_θ the reassembly whose channels beyond θ
are split (`quant.reassembly`), f what the linears compute together: attention before its output projection, the product of gate and
up, or the linear itself. θ falls from the largest magnitude in steps of (max - min) / max(100, max / 0.5) until splitting adds more than
`ratio` · C channels. Shapes: x `[S, T, C]`, W `[N, C]`; max and min over the channels' largest magnitudes on all calibration text.
Sites: the inputs of queries, keys and values, of gate and up, and of down; the output projection's is left alone.

variant  distance of channels                           pairs, in the search         candidates
reference the code's, with signed sums of weights       chosen before splitting      θ that split something, and a loss below 1e5
paper     eq. 5, the output error of averaging          as they are stored           also the input as it is, which wins ties
What is stored always splits first, with pairs chosen on the widened input, as the reference's final module does.
Departures: without enough channels to merge a θ is passed over (the reference would merge outliers); queries, keys and values are
quantized only where the scheme says so; `samples` holds the first sequences of the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.activation import fake_quantize_activation
from quant.errors import require_finite
from quant.grids import choose_grid, round_weight
from quant.methods.base import InputGroup, Reassembled, ScaleGroup
from quant.parameters import Checked
from quant.reassembly import DISTANCES, Reassembly, assemble, copies, distances
from quant.scheme import ActivationScheme, Supports, WeightScheme
from quant.statistics import Statistics

FAMILIES = ("llama", "mistral", "qwen2", "gemma")
WORST = 1e5
"""Losses from here on are never taken by the reference."""


@dataclass(frozen=True)
class QllmReassembly(Checked):
    name: ClassVar[str] = "qllm_reassembly"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[str]] = frozenset({"absmax", "samples"})
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = False
    for_activations: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports(families=FAMILIES)

    variant: str = "reference"
    """reference: the published code's distance and search; paper: eq. 5, searched as it is stored."""
    ratio: float = 0.1
    """Most channels that splitting may add, as a share; the published runs use 0.2."""
    sequences: int = 1
    """Of the samples, for distances and losses."""
    grid: str | None = "omni"
    """Of the weights in the search, a name of `quant.grids`; symmetric schemes use g_sym, None is g_sym or g_asym as the scheme says."""

    def scale(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """None: inputs are changed in `reassemble`."""
        return None

    def rewrite(self, name: str, weight: Tensor, statistics: Statistics, scheme: WeightScheme) -> Tensor | None:
        """None."""
        return None

    @torch.no_grad()
    def reassemble(self, group: InputGroup, scheme: WeightScheme, activation: ActivationScheme | None) -> Reassembled:
        """The reassembly of least loss. Raises ValueError for missing statistics."""
        if activation is None:
            return Reassembled(None, reason="activations are not quantized")
        group.statistics.require(self.name, "absmax", "samples")
        assert group.statistics.absmax is not None
        assert group.statistics.samples is not None
        peaks = group.statistics.absmax
        require_finite("activation absmax", peaks)
        search = _Search(self, group, scheme, activation, group.statistics.samples[: self.sequences])
        start = search.loss(None)
        best, least = None, (WORST if self.variant == "reference" else start)
        facts: dict[str, Any] = {"start_loss": start, "loss": start, "candidates": 0}
        for threshold, splits in thresholds(peaks, self.ratio):
            stored = search.stored(splits)
            tried = stored if stored is None or self.variant == "paper" else search.searched(splits)
            if stored is None or tried is None:
                continue
            loss = search.loss(tried)
            facts["candidates"] += 1
            if loss < least:
                best, least = stored, loss
                facts |= {"threshold": threshold, "added": stored.added, "loss": loss}
        reason = None if best is not None else "no channel stands out" if not facts["candidates"] else "no threshold lessens the loss"
        return Reassembled(best, facts, reason)


def thresholds(peaks: Tensor, ratio: float) -> Iterator[tuple[float, Tensor]]:
    """(θ, copies `[C]` int64) from the largest θ down, for every new number of added channels up to `ratio` · C."""
    low, high = float(peaks.min()), float(peaks.max())
    steps = max(100, int(high / 0.5))
    added = 0
    for k in range(1, steps + 1):
        threshold = high - k * (high - low) / steps
        if threshold <= 0:
            return
        splits = copies(peaks, threshold)
        count = int(splits.sum()) - splits.numel()
        if count > ratio * splits.numel():
            return
        if count != added:
            added = count
            yield threshold, splits


class _Search:
    """Of one group: what a reassembly makes of the quantized function."""

    def __init__(
        self, method: QllmReassembly, group: InputGroup, scheme: WeightScheme, activation: ActivationScheme, samples: Tensor
    ) -> None:
        weights = {n: w.detach() for n, w in group.consumers.items()}
        for name, w in weights.items():
            require_finite(f"weight {name}", w)
        wide = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
        self._weights = {n: w.to(wide) for n, w in weights.items()}
        self._x = samples.to(wide)
        self._group, self._activation = group, activation
        self._schemes = {n: group.schemes.get(n, scheme) for n in weights}
        self._grids = {n: choose_grid(method.grid, own)[0] for n, own in self._schemes.items()}
        self._target = group.forward(self._weights, self._x)
        self._distance = DISTANCES[method.variant]
        self._apart: Tensor | None = None

    def stored(self, splits: Tensor) -> Reassembly | None:
        return assemble(self._distances(), splits, widened=True)

    def searched(self, splits: Tensor) -> Reassembly | None:
        return assemble(self._distances(), splits, widened=False)

    def loss(self, r: Reassembly | None) -> float:
        """Mean squared difference from the unquantized function; None: of the input as it is."""
        x = self._x if r is None else r.apply(self._x)
        weights = self._weights if r is None else {n: r.weight(w) for n, w in self._weights.items()}
        quantized = {n: round_weight(self._grids[n], w, self._schemes[n]) for n, w in weights.items()}
        out = self._group.forward(quantized, fake_quantize_activation(x, self._activation))
        return float(F.mse_loss(out.double(), self._target.double()))

    def _distances(self) -> Tensor:
        if self._apart is None:
            # Split channels are never merged, so that the distances of the others serve every threshold.
            self._apart = distances(self._x.flatten(0, -2), torch.cat(list(self._weights.values())), self._distance)
        return self._apart
