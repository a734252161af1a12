"""CLAQ (Wang et al. 2024, arXiv 2405.17233): a k-means codebook per input column, inside GPTQ's column loop.

Objective: min tr((W - Q) H (W - Q)ᵀ) greedily, as GPTQ; column j, with all earlier errors fed back, is replaced by the nearest of 2^b
centres of its own, which are the k-means centres of that very column. Shapes: weight `[N, K]`, Hessian `[K, K]`, codebook `[K, 2^b]`.
AP (adaptive precision): `adaptive_bits` X gives 4 bits to the columns of highest score, (X - 2) / 2 of them over 2 bits, or X - 3 over 3.
OR (outlier reservation): both tails of every column are kept as they are, fractions p of 0.014 in the tenth of columns of highest score
and of 0.004 in the others, inclusive: of the sorted column, ranks 0 to round(N p) and from round(N (1 - p)) on. They count in the
k-means fit. Score of a column: weights of at least 13 times the mean size (magnitude), or the mean of w² / U_jj² (hessian).
The behaviour is the reference code's; `variant="reference"` repeats its mistake of looking a column's fraction up by its index inside
its block, so that every block has the pattern of the first, and ranks columns for OR by magnitude whatever the score;
"corrected" looks the fraction up by column, ranked by the score.
`codebooks="batched"` takes the centres from column j as given, before any error is fed back, all columns of a width in one call of k-means:
on a GPU one launch in place of a fit for each column in turn. A departure of our own: the published code fits in the loop ("in_loop"). The
same where H is diagonal; elsewhere centres miss what feedback moves: 0.1 to 3 percent more output error on the tests' golden inputs.
Departures: k-means is scikit-learn's algorithm with its random numbers, in float64 and with clusters that lose all members left where
they are; tables are rounded to the stored type before codes are chosen; a column of at most 2^b values is kept exactly; ties of scores
keep the order of columns (the reference sorts unstably); a column that its table holds exactly, or with equal weights at its tails, does
not store outliers that the table gives already; below 1 / (2 p) rows, where the reference stops, the lower tail is empty.
Inside a block, products of errors and differences are rounded apart, whatever a CPU's vectors and threads (version 2).
What GPTQ does with dead inputs, ties of the order and damping holds here too.
Float64 weights are computed in float64, all others in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.factors import inverse_factor, revive_dead
from quant.grids import DTYPES, with_stored_scales
from quant.kernels import Kernel, claq_block, kernel
from quant.kernels.claq_block import Found, Part, SolvedBlock, Wanted, refuse
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.feedback import checked_together, damping_notes, without_dead
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.solver import SolveBlock, Solved, solve_blocks
from quant.statistics import Statistics
from quant.tensors.codebook import CodebookTensor, Outliers

LARGE = 13
"""Times the mean |w|: what the magnitude score counts."""
TENTH, MANY, FEW = 0.1, 0.014, 0.004
"""Share of columns of which more is reserved; the fraction reserved at each tail there and elsewhere."""
BATCHED = "codebooks=batched: k-means of the columns as given, where the published code fits each after the errors of earlier ones"
LABEL_OR = 0.005
"""Average fraction of one tail: all that the paper's label counts of reserved weights, at 16 - b bits."""


@dataclass(frozen=True)
class Claq(Checked):
    name: ClassVar[str] = "claq"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(granularity=("channel",))
    optional: ClassVar[frozenset[str]] = frozenset({"codebooks"})
    """As in `Gptq`."""

    adaptive_bits: float | None = None
    """AP: bits per weight over 2 and up to 4, by columns of weight.bits (which must be 2 below 3, else 3) and of 4 bits; None: no AP."""
    outlier_reservation: bool = False
    """OR: keep the tails of every column."""
    score: str = "magnitude"
    """Of columns: magnitude or hessian."""
    variant: str = "reference"
    """reference: a column's reserved fraction by its index inside its block; corrected: by column."""
    layer_bits: tuple[tuple[str, float], ...] | None = None
    """Module path or pattern ▸ bits (2 to 4, as adaptive_bits) of these linears; the others are as the other parameters say."""
    kmeans_start: str = "plus_plus"
    """plus_plus: as the reference code's library; partition: less error on the average (`quant.kernels.kmeans_columns`)."""
    codebooks: str = "in_loop"
    """in_loop: of the column with earlier errors fed back, as published; batched: of the column as given."""
    act_order: bool = True
    """Columns by decreasing diagonal of H."""
    block_size: int = 128
    """Columns between updates of all later columns; matters with outlier_reservation and variant=reference only."""
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal."""
    true_sequential: bool = False
    """Read by the block loop, not here: with propagation=quantized, linears also see the quantized ones before them."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ codebooks. Raises NonFiniteError, SingularHessianError, and ValueError for shapes and bits that do not fit."""
        work = self._work([weight], statistics, [scheme], [self._target(scheme, linear)])
        tensor, notes = with_stored_scales(scheme, lambda dtype: self._solve(work, [dtype])[0])
        return work.rounded(0, tensor, notes)

    def stacks(self, weights: Sequence[Tensor], schemes: Sequence[WeightScheme]) -> bool:
        """Bits may differ where the schemes say them alone: `layer_bits` goes by names, which are not known here, and one that does not fit
        `adaptive_bits` is to be told by its linear's name."""
        own = self.adaptive_bits is None or len({s.bits for s in schemes}) == 1
        return own and not self.layer_bits and len({w.dtype for w in weights}) == 1

    def quantize_stacked(self, weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[WeightScheme]) -> list[Rounded]:
        """As `quantize` has it for each; raises ScaleDtypeError too. Side by side: a column is fitted by one multiprocessor of a GPU, while
        the columns after it wait, so that several linears take the time of one."""
        work = self._work(weights, statistics, schemes, [self._target(s, ANY) for s in schemes])
        tensors = self._solve(work, [DTYPES[s.scale_dtype] for s in schemes])
        return [work.rounded(i, tensor, []) for i, tensor in enumerate(tensors)]

    def _work(self, weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[WeightScheme], targets: Sequence[float]) -> _Work:
        ready, hessian = checked_together("claq", weights, statistics)
        h, dead = revive_dead(hessian)
        zeroed = int(dead.sum())
        order = torch.argsort(h.diagonal(), descending=True, stable=True) if self.act_order else torch.arange(len(h), device=h.device)
        upper, damp = inverse_factor(h[order][:, order], self.damp)
        notes = damping_notes(self.damp, damp)
        block = kernel("claq_block", device=h.device)
        work = _Work(order, upper, damp, block, [])
        for w, scheme, target in zip(ready, schemes, targets, strict=True):
            live, zeros = without_dead(w, dead, zeroed)
            own = ["codebooks have no symmetric form: weight.symmetric has no effect"] if scheme.symmetric else []
            work.parts.append(self._planned(live.T[order], upper, target, [*own, *zeros, *notes]))
            work.parts[-1].notes.extend(block.notes)
        return work

    def _planned(self, columns: Tensor, upper: Tensor, target: float, notes: list[str]) -> _Planned:
        n = columns.shape[1]
        ranks = ranked(columns, upper, self.score)
        widths, fractions, centres = widths_of(target, ranks), None, None
        if self.outlier_reservation:
            by_size = self.variant == "reference" and self.score != "magnitude"
            fractions = self._fractions(ranked(columns, upper, "magnitude") if by_size else ranks)
        if fractions is not None and tails(n, FEW)[1] == 0:
            notes.append(f"outlier reservation: {n} rows are too few for the fraction {FEW}, whose lower tail is empty")
        if self.codebooks == "batched":
            fit = kernel("kmeans_columns", device=columns.device)
            centres = centres_of(columns, widths, fit.run, self.kmeans_start)
            notes += [BATCHED, *fit.notes]
        return _Planned(columns, widths, fractions, centres, label_of(target, fractions is not None), notes)

    def _solve(self, work: _Work, dtypes: Sequence[torch.dtype]) -> list[CodebookTensor]:
        fitted = [Codebooks(p.widths, p.fractions, d, self.kmeans_start, p.centres) for p, d in zip(work.parts, dtypes, strict=True)]
        solve = side_by_side(work.block, fitted)
        made = solve_blocks([p.columns for p in work.parts], work.upper, self.block_size, solve, looks_ahead=False)
        for solved, p in zip(made, work.parts, strict=True):
            p.notes.extend(n for n in solved.notes if n not in p.notes)
        return [f.tensor(solved, work.order, p.label) for f, solved, p in zip(fitted, made, work.parts, strict=True)]

    def _target(self, scheme: WeightScheme, linear: Linear) -> float:
        """Bits per weight of this linear's codes."""
        if self.layer_bits:
            given = dict(self.layer_bits)
            fitting = (
                {linear.name: given[linear.name]}
                if linear.name in given
                else {p: b for p, b in given.items() if fnmatchcase(linear.name, p)}
            )
            if len(set(fitting.values())) > 1:
                raise ValueError(f"layer_bits gives {linear.name} different bits: {fitting}; name it, or let one pattern fit")
            if fitting:
                return float(next(iter(fitting.values())))
        if self.adaptive_bits is None:
            return float(scheme.bits)
        base = base_of(self.adaptive_bits)
        if scheme.bits != base and (self.adaptive_bits, scheme.bits) != (4, 3):
            raise ValueError(
                f"adaptive_bits={self.adaptive_bits} mixes columns of {base} and 4 bits: set weight.bits={base}, not {scheme.bits}"
            )
        return self.adaptive_bits

    def _fractions(self, ranks: Tensor) -> list[float]:
        """Reserved at each tail, by position in the order of work."""
        most = set(ranks[: round(TENTH * len(ranks))].tolist())
        own = [MANY if j in most else FEW for j in range(len(ranks))]
        return own if self.variant == "corrected" else [own[j % self.block_size] for j in range(len(own))]


def ranked(columns: Tensor, upper: Tensor, score: str) -> Tensor:
    """Positions `[K]` by decreasing score, of weights `[K, N]` in the order of work; equal scores keep it."""
    if score == "magnitude":
        size = columns.abs()
        scores = (size >= LARGE * size.mean()).sum(1)
    else:
        scores = columns.square().mean(1) / upper.diagonal().square()
    return torch.argsort(scores, descending=True, stable=True)


def base_of(target: float) -> int:
    """Bits of the columns of low score."""
    return 2 if target < 3 else int(target)


def widths_of(target: float, ranks: Tensor) -> list[int]:
    """Bits of each column, by position in the order of work, for an average near `target`."""
    k, base = len(ranks), base_of(target)
    widths = [base] * k
    for j in ranks[: round((target - base) / (4 - base) * k)].tolist() if base < 4 else []:
        widths[j] = 4
    return widths


def centres_of(columns: Tensor, widths: list[int], run: Any, start: str) -> Tensor:
    """`[K, 2^b]` of columns `[K, N]` as they are, zeros beyond a column's own; b is the largest width. `run`: the kernel's module."""
    centres, each = columns.new_zeros(len(columns), 2 ** max(widths)), torch.tensor(widths)
    for width in sorted(set(widths)):
        own = (each == width).nonzero()[:, 0].to(columns.device)
        centres[own, : 2**width] = run.kmeans(columns[own], 2**width, start)
    return centres


def label_of(target: float, reserved: bool) -> float:
    """The paper's bits: 2.05 with reservation is "2.12"."""
    return target + (LABEL_OR * (16 - base_of(target)) if reserved else 0.0)


def tails(n: int, fraction: float) -> tuple[int, int]:
    """Values kept at the top and at the bottom of a column of n, ties not counted."""
    return min(n, round(n * fraction) + 1), n - round(n * (1 - fraction))


def details_of(tensor: CodebookTensor) -> dict[str, Any]:
    """JSON facts: number of columns of each width, share of weights kept, what the storage formula gives."""
    kept = 0 if tensor.outliers is None else tensor.outliers.values.numel()
    counts = Counter(tensor.widths.tolist())
    return {
        "columns_by_bits": {str(b): counts[b] for b in sorted(counts)},
        "outlier_share": kept / tensor.codes.numel(),
        "bits_formula": tensor.bits_formula,
    }


@dataclass
class _Planned:
    """Of one linear, in the order of work."""

    columns: Tensor
    """`[K, N]`, dead inputs' 0."""
    widths: list[int]
    fractions: list[float] | None
    centres: Tensor | None
    label: float
    notes: list[str]


@dataclass
class _Work:
    """Linears that read one input."""

    order: Tensor
    upper: Tensor
    damp: float
    block: Kernel
    parts: list[_Planned]

    def rounded(self, number: int, tensor: CodebookTensor, notes: list[str]) -> Rounded:
        return Rounded(tensor, damp=self.damp, notes=[*self.parts[number].notes, *notes], details=details_of(tensor))


class Codebooks:
    """Codebooks and kept weights of a linear's blocks rounded so far, in the order of work. On a GPU the host waits for none of them."""

    def __init__(
        self, widths: list[int], fractions: list[float] | None, dtype: torch.dtype, start: str, centres: Tensor | None = None
    ) -> None:
        """centres: `[K, 2^b]`, where they are not to be fitted in the loop."""
        self.widths, self.fractions, self.dtype, self.start = widths, fractions, dtype, start
        self.centres = centres
        self.found: list[Found] = []

    def part(self, start: int, count: int, weights: Tensor, out: SolvedBlock) -> Part:
        """Columns start .. start + count - 1 of weights `[K, N]`."""
        own, n = slice(start, start + count), weights.shape[1]
        ends = None if self.fractions is None else [tails(n, fraction) for fraction in self.fractions[own]]
        widths = self.widths[own]
        centres = None if self.centres is None else self.centres[own, : 2 ** max(widths)].contiguous()
        return Part(weights[own], Wanted(widths, ends, self.dtype, self.start, centres), out)

    def tensor(self, solved: Solved, order: Tensor, label: float) -> CodebookTensor:
        """From codes and values in the order of work."""
        wrong = [found.wrong for found in self.found if found.wrong is not None]
        if wrong:
            refuse(torch.stack(wrong).any(0))
        codes, k, device = solved.codes, len(order), solved.codes.device
        position = torch.empty_like(order)
        position[order] = torch.arange(k, device=device)
        widths = torch.tensor(self.widths, device=device)
        tables = torch.zeros(k, 2 ** int(widths.max()), dtype=self.dtype, device=device)
        done = 0
        for found in self.found:
            tables[done : done + len(found.tables), : found.tables.shape[1]] = found.tables
            done += len(found.tables)
        outliers = None
        if self.fractions is not None:
            mask = torch.cat([found.kept for found in self.found if found.kept is not None])[position]
            outliers = Outliers(mask.sum(1), mask.nonzero()[:, 1], solved.values[position][mask].to(self.dtype))
        return CodebookTensor(codes[position].T.contiguous(), widths[position], tables[position], label, outliers)


def side_by_side(block: Kernel, fitted: Sequence[Codebooks]) -> SolveBlock:
    """For `solve_blocks`, of as many weights."""

    def solve(start: int, weights: list[Tensor], upper: Tensor, outs: list[SolvedBlock]) -> None:
        parts = [f.part(start, len(upper), w, out) for f, w, out in zip(fitted, weights, outs, strict=True)]
        for f, found in zip(fitted, claq_block.solve_blocks(block.run, parts, upper), strict=True):
            f.found.append(found)

    return solve
