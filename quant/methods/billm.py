"""BiLLM (Huang et al. 2024, arXiv 2402.04291): one-bit weights, with salient columns binarized twice and the others split in two.

Objective: least ||W - Q||² in each block of columns, block by block with the error fed to later columns (H as in GPTQ).
Shapes: weight `[N, K]`, Hessian `[K, K]`; blocks of `block_size` columns, the last one as wide as what is left.
Per block: columns are ranked by saliency and the first k are salient; a threshold splits the other weights into low and high;
each part has one scale (and mean) per row, salient columns a second sign and scale.

variant     ranked by              k and threshold chosen by                       means   error feedback
reference   Σ|M|                   M binarized: k of 1..49 against an unsplit      yes     between blocks
                                   rest, then t of 81 quantiles of |M|
paper       Σ w²/[H⁻¹]_jj²         w binarized: k of 3..30 against an unsplit      no      column by column
                                   rest, then t of 0.1..0.9 of max |w|
joint       Σ w²/U_jj²             w binarized: k of 0..49 and t of 81 quantiles   no      column by column
                                   of |w| together
M is w²/U_jj² (metric hessian; the reference searches on the saliency itself) or w (magnitude, which also ranks the other
variants by Σ|w|). `joint` is this project's. Masks and scales are those of the block's start; with feedback in the block, signs
are chosen for the compensated weights.
Departures: sign(0) is +1, as one bit stores it; blocks of fewer columns than candidates try what is there (the reference needs
50); what is fed back is computed from scales and means as stored; damping and dead inputs as in `gptq`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.binary import binarize, must_fit, rounded
from quant.grids import with_stored_scales
from quant.methods import binary_search as search
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.feedback import Prepared, prepare
from quant.scheme import Supports, WeightScheme
from quant.solver import solve_columns
from quant.statistics import Statistics
from quant.tensors.binary import BinaryTensor, decode

VARIANTS = ("reference", "paper", "joint")
METRICS = ("hessian", "magnitude")


@dataclass(frozen=True)
class Billm:
    name: ClassVar[str] = "billm"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(1,), granularity=("channel",), ragged_groups=True)

    variant: str = "reference"
    """reference, paper or joint."""
    metric: str = "hessian"
    """hessian or magnitude."""
    block_size: int = 128
    """Columns that share a choice of salient columns, a threshold and scales; 32 to 512 are usual."""
    salient_columns: int | None = None
    """Count of salient columns of every block; None searches it."""
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant} is unknown; choose one of {', '.join(VARIANTS)}")
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric} is unknown; choose one of {', '.join(METRICS)}")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1; 128 is usual")
        if self.salient_columns is not None and self.salient_columns < 0:
            raise ValueError(f"salient_columns={self.salient_columns} must be 0 or more, or null to search the count")
        if not 0 <= self.damp < float("inf"):
            raise ValueError(f"damp={self.damp} must be 0 or more, a fraction of mean(diag H); 0.01 is usual")

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ signs. Raises NonFiniteError, SingularHessianError, and ValueError for shapes that do not fit."""
        ready = prepare(self.name, weight, statistics, self.damp)
        tensor, notes = with_stored_scales(scheme, lambda dtype: self._run(ready, dtype))
        return Rounded(tensor, ready.damp, ready.notes + notes, details(tensor))

    def _run(self, ready: Prepared, scale_dtype: torch.dtype) -> BinaryTensor:
        blocks = _Blocks(self, ready, scale_dtype)
        if self.variant != "reference":
            codes = solve_columns(ready.weight.T, ready.upper, self.block_size, blocks.round_column).codes.T
            return blocks.tensor(codes >= 2, (codes % 2).bool())
        w, upper = ready.weight.clone(), ready.upper
        signs: list[Tensor] = []
        second: list[Tensor] = []
        for start in range(0, w.shape[1], self.block_size):
            end = min(start + self.block_size, w.shape[1])
            block = w[:, start:end]
            first, other = blocks.begin(start, block)
            signs.append(first)
            second.append(other)
            errors = (block - blocks.decode(first, other)) / upper.diagonal()[start:end]
            w[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
        return blocks.tensor(torch.cat(signs, 1), torch.cat(second, 1))


@dataclass
class _Blocks:
    """Masks, scales and means of every block; the last one is at work."""

    method: Billm
    ready: Prepared
    scale_dtype: torch.dtype
    salient: list[Tensor] = field(default_factory=list)
    split: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)
    mean: list[Tensor | None] = field(default_factory=list)
    wrong: list[Tensor] = field(default_factory=list)
    """Scales and means that their stored type does not hold; asked for once, at the end."""
    first: Tensor = field(init=False)
    """`[C, N]`: first scales of the block at work, a row per column."""
    other: Tensor = field(init=False)
    """`[C, N]`: second scales, 0 where there is no second sign."""

    def begin(self, start: int, block: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the masks of a block `[N, C]`; its signs and second signs `[N, C]` at its start."""
        method, means = self.method, self.method.variant == "reference"
        salient, split = CHOICES[method.variant](block, self._saliency(start, block), method)
        low, high = binarize(block, ~salient & ~split, 1, means=means), binarize(block, split, 1, means=means)
        twice = binarize(block, salient, 2, means=means)
        scale = torch.stack([low.scale[0], high.scale[0], *twice.scale], dim=1)
        mean = torch.stack([low.mean[0], high.mean[0], twice.mean[0] + twice.mean[1]], dim=1) if means else None
        scale, mean, wrong = rounded(scale, mean, self.scale_dtype)
        self.wrong.append(wrong)
        self.salient.append(salient)
        self.split.append(split)
        self.scale.append(scale)
        self.mean.append(mean)
        signs = torch.where(salient, twice.signs[0], torch.where(split, high.signs[0], low.signs[0]))
        return signs, twice.signs[1]

    def _saliency(self, start: int, block: Tensor) -> Tensor:
        """M `[N, C]`."""
        if self.method.metric == "magnitude":
            return block
        columns = slice(start, start + block.shape[1])
        if self.method.variant == "paper":
            # [H⁻¹]_jj² of the whole matrix, not of the columns that are left.
            return block.square() / self.ready.upper[:, columns].square().sum(0).square()
        return block.square() / self.ready.upper.diagonal()[columns].square()

    def decode(self, signs: Tensor, second: Tensor) -> Tensor:
        return decode(signs, second, self.split[-1], self.salient[-1], self.scale[-1], self.mean[-1])

    def round_column(self, j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A column of a variant without means, after the errors of those before it; codes are 2 · sign + second sign."""
        i = j % self.method.block_size
        if i == 0:
            self._begin_columns(j, weights[j : j + self.method.block_size].T.contiguous())
        first, other = self.first[i], self.other[i]
        plus = column >= 0
        value = torch.where(plus, first, -first)
        second = column - value >= 0
        return 2 * plus.to(column) + second.to(column), value + torch.where(second, other, -other)

    def _begin_columns(self, start: int, block: Tensor) -> None:
        self.begin(start, block)
        low, high, salient, second = self.scale[-1].unbind(1)
        marked = self.salient[-1][:, None]
        self.first = torch.where(marked, salient, torch.where(self.split[-1].T, high, low))
        # A column without a second sign adds 0, whatever that sign is.
        self.other = torch.where(marked, second, 0)

    def tensor(self, signs: Tensor, second: Tensor) -> BinaryTensor:
        means, salient = [m for m in self.mean if m is not None], torch.cat(self.salient)
        must_fit(torch.stack(self.wrong).sum(), sum(t.numel() for t in (*self.scale, *means)), self.scale_dtype)
        return BinaryTensor(
            signs.contiguous(),
            second & salient,
            torch.cat(self.split, 1),
            salient,
            torch.stack(self.scale, dim=1).to(self.scale_dtype),
            torch.stack(means, dim=1).to(self.scale_dtype) if means else None,
            self.method.block_size,
        )


# --- masks of one block: weights `[N, C]`, saliency `[N, C]` ▸ salient columns `[C]`, split `[N, C]` -------------------


def _counts(method: Billm, columns: int, least: int, most: int) -> range:
    if method.salient_columns is not None:
        k = min(method.salient_columns, columns)
        return range(k, k + 1)
    most = min(most, columns)
    return range(min(least, most), most + 1)


def _first(order: Tensor, count: int) -> Tensor:
    salient = torch.zeros(order.numel(), dtype=torch.bool, device=order.device)
    salient[order[:count]] = True
    return salient


def _above(x: Tensor, salient: Tensor, threshold: Tensor) -> Tensor:
    return (x.abs() >= threshold) & ~salient


def _reference(block: Tensor, m: Tensor, method: Billm) -> tuple[Tensor, Tensor]:
    order = search.ranked(m.abs().sum(0))
    counts = _counts(method, m.shape[1], 1, 49)
    ordered = m[:, order]
    # The host never waits for a count or a threshold: a GPU goes from block to block.
    k = search.first_least(search.order_two_errors(ordered, counts)) + counts[0]
    salient = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, torch.arange(len(order), device=order.device) < k)
    # The zeros of salient columns count in the quantiles.
    thresholds = search.reference_quantiles(m.masked_fill(salient, 0).abs())
    errors = search.split_errors(ordered, thresholds, skip=k)
    return salient, _above(m, salient, thresholds.gather(0, search.first_least(errors)[None]))


def _paper(block: Tensor, m: Tensor, method: Billm) -> tuple[Tensor, Tensor]:
    order = search.ranked(m.abs().sum(0))
    counts = _counts(method, block.shape[1], 3, 30)
    magnitude = block[:, order].abs()
    never = magnitude.new_full((1,), math.inf)
    k = counts[int(search.first_least(search.joint_errors(magnitude, counts, never)))]
    salient, rest = _first(order, k), magnitude[:, k:]
    if not rest.numel():
        return salient, torch.zeros_like(block, dtype=torch.bool)
    fractions = torch.arange(1, 10, device=block.device).to(block) / 10
    thresholds = fractions * rest.max()
    errors = search.joint_errors(rest, range(1), thresholds)
    return salient, _above(block, salient, thresholds[search.first_least(errors)])


def _joint(block: Tensor, m: Tensor, method: Billm) -> tuple[Tensor, Tensor]:
    order = search.ranked(m.abs().sum(0))
    counts = _counts(method, block.shape[1], 0, 49)
    magnitude = block[:, order].abs()
    thresholds = search.reference_quantiles(magnitude)
    found = int(search.first_least(search.joint_errors(magnitude, counts, thresholds)))
    salient = _first(order, counts[found // thresholds.numel()])
    return salient, _above(block, salient, thresholds[found % thresholds.numel()])


CHOICES: dict[str, Callable[[Tensor, Tensor, Billm], tuple[Tensor, Tensor]]] = {
    "reference": _reference,
    "paper": _paper,
    "joint": _joint,
}


def details(tensor: BinaryTensor) -> dict[str, Any]:
    """The paper's two counts of bits (N_param; N_storing, which it names beside it: the flags' share) and what the masks
    hold: entropies in bits per flag, split flags counted where they are stored."""
    share = tensor.salient_share
    plain = tensor.split[:, ~tensor.salient]
    high = float(plain.double().mean()) if plain.numel() else 0.0
    return {
        "n_param": 1 + share,
        "n_storing": 1 + 1 / tensor.block_size,
        "salient_share": share,
        "split_share": high,
        "entropy_split": entropy(high),
        "entropy_columns": entropy(share),
    }


def entropy(p: float) -> float:
    """Bits of a flag that is set with probability p."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
