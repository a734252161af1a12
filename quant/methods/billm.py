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
from quant.errors import NonFiniteError
from quant.grids import with_stored_scales
from quant.kernels import braq_block, kernel
from quant.kernels.braq_block.eager import first_least, ranked, reference_quantiles
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.billm_search import joint_errors
from quant.methods.feedback import Prepared, prepare
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.solver import Reach, solve_columns, to_work_on
from quant.statistics import Statistics
from quant.tensors.binary import BinaryTensor


@dataclass(frozen=True)
class Billm(Checked):
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

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ signs. Raises NonFiniteError (weights near 1e17, too), SingularHessianError, and ValueError for shapes that do not
        fit."""
        ready = prepare(self.name, weight, statistics, self.damp)
        self._must_fit(ready)
        slower: list[str] = []
        tensor, notes = with_stored_scales(scheme, lambda dtype: self._run(ready, dtype, slower))
        return Rounded(tensor, ready.damp, [*ready.notes, *slower, *notes], details(tensor))

    def _must_fit(self, ready: Prepared) -> None:
        """Raises NonFiniteError where a search may overflow: it squares a row's sum over a block, of w²/U_jj² or of w."""
        w, saliencies = ready.weight, self.variant == "reference" and self.metric == "hessian"
        largest = float((w.abs().amax(0) / ready.upper.diagonal() if saliencies else w.abs()).max())
        most = math.sqrt(torch.finfo(w.dtype).max) / self.block_size
        most = math.sqrt(most) if saliencies else most
        if largest > most:
            what, kind = "|w| / U_jj" if saliencies else "|w|", str(w.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"weights are too large for billm: {what} is {largest:.2g} at most, and above {most:.2g} squared errors overflow {kind}; "
                "check the checkpoint, or scale the weights down"
            )

    def _run(self, ready: Prepared, scale_dtype: torch.dtype, notes: list[str]) -> BinaryTensor:
        if self.variant == "reference":
            return self._between_blocks(ready, scale_dtype, notes)
        blocks = _Blocks(self, ready, scale_dtype)
        solved = solve_columns(ready.weight.T, ready.upper, self.block_size, blocks.round_column)
        codes, notes[:] = solved.codes.T, solved.notes
        return blocks.tensor(codes >= 2, (codes % 2).bool())

    def _between_blocks(self, ready: Prepared, scale_dtype: torch.dtype, notes: list[str]) -> BinaryTensor:
        w, upper = to_work_on(ready.weight), ready.upper
        k = w.shape[1]
        wanted = braq_block.Wanted(self.block_size, scale_dtype, self.metric == "hessian", self.salient_columns)
        block, out = braq_block.chosen(w, wanted), braq_block.Binarized.like(w, self.block_size)
        later = kernel("lazy_update", device=w.device, later=w)
        notes[:] = [*block.notes, *later.notes]
        solve = block.run.solver(w, upper, wanted, out)
        reach = Reach(later.run.reach(self.block_size, w.device), k)
        held = w.new_empty(len(w), min(reach.size, k)) if reach.size > self.block_size else None
        for start in range(0, k, self.block_size):
            end, errors = min(start + self.block_size, k), solve(start)
            if held is not None:  # the next block's errors may lie where these do
                held[:, reach.held(slice(start, end))] = errors
            if (off := reach.after(start, end)) is not None:
                done, rest = off
                left = errors if done.start == start or held is None else held[:, reach.held(done)]
                later.run.lazy_update(w[:, rest], left, upper[done, rest])
        must_fit(out.wrong, out.scale.numel() + out.mean.numel(), scale_dtype)
        flags = (out.signs, out.second, out.split, out.salient)
        return BinaryTensor(*flags, out.scale.to(scale_dtype), out.mean.to(scale_dtype), self.block_size)


@dataclass
class _Blocks:
    """Masks and scales of every block of a variant without means; the last one is at work."""

    method: Billm
    ready: Prepared
    scale_dtype: torch.dtype
    salient: list[Tensor] = field(default_factory=list)
    split: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)
    wrong: list[Tensor] = field(default_factory=list)
    """Scales that their stored type does not hold; asked for once, at the end."""
    first: Tensor = field(init=False)
    """`[C, N]`: first scales of the block at work, a row per column."""
    other: Tensor = field(init=False)
    """`[C, N]`: second scales, 0 where there is no second sign."""

    def _begin(self, start: int, block: Tensor) -> None:
        """Choose the masks and scales of a block `[N, C]`."""
        salient, split = CHOICES[self.method.variant](block, self._saliency(start, block), self.method)
        low, high = binarize(block, ~salient & ~split, 1, means=False), binarize(block, split, 1, means=False)
        twice = binarize(block, salient, 2, means=False)
        [scale], wrong = rounded([torch.stack([low.scale[0], high.scale[0], *twice.scale], dim=1)], self.scale_dtype)
        self.wrong.append(wrong)
        self.salient.append(salient)
        self.split.append(split)
        self.scale.append(scale)
        marked = salient[:, None]
        self.first = torch.where(marked, scale[:, 2], torch.where(split.T, scale[:, 1], scale[:, 0]))
        # A column without a second sign adds 0, whatever that sign is.
        self.other = torch.where(marked, scale[:, 3], 0)

    def _saliency(self, start: int, block: Tensor) -> Tensor:
        """M `[N, C]`."""
        if self.method.metric == "magnitude":
            return block
        columns = slice(start, start + block.shape[1])
        if self.method.variant == "paper":
            # [H⁻¹]_jj² of the whole matrix, not of the columns that are left.
            return block.square() / self.ready.upper[:, columns].square().sum(0).square()
        return block.square() / self.ready.upper.diagonal()[columns].square()

    def round_column(self, j: int, column: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A column after the errors of those before it; codes are 2 · sign + second sign."""
        i = j % self.method.block_size
        if i == 0:
            self._begin(j, weights[j : j + self.method.block_size].T.contiguous())
        first, other = self.first[i], self.other[i]
        plus = column >= 0
        value = torch.where(plus, first, -first)
        second = column - value >= 0
        return 2 * plus.to(column) + second.to(column), value + torch.where(second, other, -other)

    def tensor(self, signs: Tensor, second: Tensor) -> BinaryTensor:
        salient, scale = torch.cat(self.salient), torch.stack(self.scale, dim=1)
        must_fit(torch.stack(self.wrong).sum(), scale.numel(), self.scale_dtype)
        return BinaryTensor(
            signs.contiguous(),
            second & salient,
            torch.cat(self.split, 1),
            salient,
            scale.to(self.scale_dtype),
            None,
            self.method.block_size,
        )


# --- masks of one block of a variant without means: weights `[N, C]`, saliency `[N, C]` ▸ salient columns `[C]`, split `[N, C]` ----


def _first(order: Tensor, count: int) -> Tensor:
    salient = torch.zeros(order.numel(), dtype=torch.bool, device=order.device)
    salient[order[:count]] = True
    return salient


def _above(x: Tensor, salient: Tensor, threshold: Tensor) -> Tensor:
    return (x.abs() >= threshold) & ~salient


def _paper(block: Tensor, m: Tensor, method: Billm) -> tuple[Tensor, Tensor]:
    order = ranked(m.abs().sum(0))
    counts = braq_block.counts(method.salient_columns, block.shape[1], 3, 30)
    magnitude = block[:, order].abs()
    never = magnitude.new_full((1,), math.inf)
    k = counts[int(first_least(joint_errors(magnitude, counts, never)))]
    salient, rest = _first(order, k), magnitude[:, k:]
    if not rest.numel():
        return salient, torch.zeros_like(block, dtype=torch.bool)
    fractions = torch.arange(1, 10, device=block.device).to(block) / 10
    thresholds = fractions * rest.max()
    errors = joint_errors(rest, range(1), thresholds)
    return salient, _above(block, salient, thresholds[first_least(errors)])


def _joint(block: Tensor, m: Tensor, method: Billm) -> tuple[Tensor, Tensor]:
    order = ranked(m.abs().sum(0))
    counts = braq_block.counts(method.salient_columns, block.shape[1], 0, braq_block.MOST_SALIENT)
    magnitude = block[:, order].abs()
    thresholds = reference_quantiles(magnitude)
    found = int(first_least(joint_errors(magnitude, counts, thresholds)))
    salient = _first(order, counts[found // thresholds.numel()])
    return salient, _above(block, salient, thresholds[found % thresholds.numel()])


CHOICES: dict[str, Callable[[Tensor, Tensor, Billm], tuple[Tensor, Tensor]]] = {
    "paper": _paper,
    "joint": _joint,
}


def details(tensor: BinaryTensor) -> dict[str, Any]:
    """The paper's two counts of bits (N_param; N_storing, which it names beside it: the flags' share) and what the masks
    hold: entropies in bits per flag, split flags counted where they are stored."""
    share, (n, k) = tensor.salient_share, tensor.shape
    # No copy of the flags: those of salient columns are False.
    plain = n * (k - int(tensor.salient.sum()))
    high = int(tensor.split.count_nonzero()) / plain if plain else 0.0
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
