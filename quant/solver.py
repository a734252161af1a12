"""The column solver shared by the GPTQ family (GPTQ, Frantar et al. 2022, algorithm 1).

Columns are rounded in order; the error of each is spread over the later ones so that the layer's output error
tr((W - Q) H (W - Q)ᵀ) stays least. With H⁻¹ = UᵀU, U upper triangular, U_jj² is [(H_{j:,j:})⁻¹]_jj, and the output
error equals the sum of e² with e = (w_j - q_j) / U_jj. Errors of finished columns are pushed onto later ones by U, a block at a
time; where no range looks ahead they may be pulled instead, a span at a time, by the factor of `factors.pull_factor`.

Everything here works in the float type of its arguments; weights are kept transposed, `[K, N]`, so that a column is
contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant import replay
from quant.affine import Affine
from quant.kernels import kernel
from quant.kernels.gptq_block import Fits, SolvedBlock

RoundColumn = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(index j, column `[N]`, weights `[K, N]`) ▸ (codes `[N]`, whole numbers in 0 .. 255, and values `[N]`). The weights hold the updates of
all finished blocks, not those of the block at work."""


@dataclass(frozen=True)
class Solved:
    """K columns of N rows."""

    codes: Tensor
    """uint8 `[K, N]`."""
    values: Tensor
    """`[K, N]`."""
    loss: Tensor
    """`[N]`: sum of e² per row, equal to the diagonal of (W - Q) H (W - Q)ᵀ."""
    notes: list[str] = field(default_factory=list)
    """Of the kernels that were chosen."""


@dataclass(frozen=True)
class Reach:
    """When the errors of finished blocks are taken off later columns: a block's at once, but from the columns of its reach alone; those of
    all blocks of a reach after the last of them, from the columns beyond. So later weights are read and written more rarely."""

    size: int
    """Columns, a multiple of a block's."""
    k: int
    """Of all columns."""

    def after(self, start: int, end: int) -> tuple[slice, slice] | None:
        """Of block start .. end - 1: columns whose errors are taken off, and from which."""
        first = start // self.size * self.size
        last = min(first + self.size, self.k)
        if end < last:
            return slice(start, end), slice(end, last)
        return (slice(first, last), slice(last, self.k)) if last < self.k else None

    def held(self, columns: slice) -> slice:
        """Where the errors of columns of one reach lie, of those of a reach that are held."""
        first = columns.start // self.size * self.size
        return slice(columns.start - first, columns.stop - first)


Ranges = Callable[[int, int, Tensor], tuple[Affine, list[int]]]
"""(start, end, weights `[K, N]`) ▸ scale and zero `[G, N]`, and of each column start .. end - 1 its row in them. The weights hold the
updates of all finished blocks."""


def solve_affine(
    weight: Tensor,
    upper: Tensor,
    block_size: int,
    ranges: Ranges,
    backend: str = "auto",
    *,
    stack: Sequence[int] | None = None,
    fits: Fits | None = None,
    spends: bool = False,
    looks_ahead: bool = True,
    span: int | None = None,
) -> Solved:
    """`solve_columns` for affine codes, a block at a time by the kernel `gptq_block`.

    stack: numbers of rows of weights that lie one after another along N. Where `stacks` says so, each has the results that it has alone,
    bit for bit.
    fits: which of the ranges each block's launch finds itself, and writes to what `ranges` gives.
    spends: the weight, contiguous, is written to, and of the values at most the last block's or span's are returned. Codes and the loss are
    to be read before the next call in this thread, and ranges go by no weights but those given; a loop over blocks may then be replayed
    (`quant.replay`).
    looks_ahead: `ranges` may read weights beyond the block; where it may not, those beyond its `Reach` lack some errors.
    span: `upper` is `factors.pull_factor`'s of spans of so many columns, a multiple of a block's, and ranges must not look ahead; None:
    it is U."""
    if span is not None and looks_ahead:
        raise ValueError("columns beyond a span lack the errors of all before it: ranges that look ahead are solved with span=None")
    w = weight if spends else weight.clone(memory_format=torch.contiguous_format)
    block_kernel = kernel("gptq_block", backend, w.device, block=w[:block_size])
    later = kernel("lazy_update", device=w.device, later=w)
    (k, n), notes, replays = w.shape, [*block_kernel.notes, *later.notes], replay.current()
    reach = block_size if looks_ahead else later.run.reach(block_size, w.device)
    span = k if span is None else min(span, k)
    pulled = span if span < k else 0
    loop = _Loop(block_kernel.run, later.run, block_size, reach, stack, fits, span)
    valued = pulled or (0 if getattr(block_kernel.run, "SKIPS_VALUES", False) else min(k, block_size)) if spends else k
    shapes = {"codes": (k, n), "values": (valued, n), "errors": (min(k, reach), n), "loss": (n,), "before": (pulled, n)}
    made = {name: torch.empty(shape, dtype=torch.uint8 if name == "codes" else w.dtype, device="meta") for name, shape in shapes.items()}
    if replays is None or not spends or fits is not None or w.dtype is not torch.float32:
        outs = {name: torch.empty_like(like, device=w.device) for name, like in made.items()}
        loop.run(w, upper, ranges, **outs)
        return Solved(outs["codes"], outs["values"], outs["loss"], notes)
    affine, group = ranges(0, k, w)
    given = {"w": w, "upper": upper, "scale": affine.scale, "zero": affine.zero, **({} if affine.tops is None else {"tops": affine.tops})}

    def solve(m: Mapping[str, Tensor]) -> None:
        own = Affine(m["scale"], m["zero"], affine.bits, affine.kind, m.get("tops"))
        loop.run(m["w"], m["upper"], lambda start, end, _: (own, group[start:end]), **{name: m[name] for name in made})

    key = (block_kernel.backend, later.backend, block_size, reach, span, affine.bits, affine.kind, tuple(group), tuple(stack or ()))
    found, note = replays.run(key, given, made, solve)
    return Solved(found["codes"], found["values"], found["loss"], notes if note is None else [*notes, note])


@dataclass(frozen=True)
class _Loop:
    """Over the blocks of columns."""

    block_kernel: Any
    later: Any
    block_size: int
    reach: int
    """Columns of a `Reach`."""
    stack: Sequence[int] | None
    fits: Fits | None
    span: int
    """All columns where errors are pushed onto them alone."""

    def run(
        self, w: Tensor, upper: Tensor, ranges: Ranges, codes: Tensor, values: Tensor, errors: Tensor, loss: Tensor, before: Tensor
    ) -> None:
        """w `[K, N]` is worked in; codes `[K, N]`, values `[K, N]` (or the last block's `[B, N]`, or span's; or `[0, N]`), errors
        `[reach, N]`, loss `[N]` and before, a span's weights `[S, N]` as given, are filled."""
        k = len(w)
        loss.zero_()
        for start in range(0, k, self.span):
            own = slice(start, min(start + self.span, k))
            more = own.stop < k
            if more:
                before.copy_(w[own])
            if start:
                self.later.lazy_update(w[own], upper[:start, own].T, w[:start], self.stack)

            def within(first: int, last: int, _: Tensor, start: int = start) -> tuple[Affine, list[int]]:
                return ranges(start + first, start + last, w)

            # Of the last span, or of all columns, nobody reads those that are not returned.
            wanted = own.stop - start if more or not getattr(self.block_kernel, "SKIPS_VALUES", False) else 0
            rounded = values[own] if len(values) == k else values[:wanted]
            self._push(w[own], upper[own, own], within, codes[own], rounded, errors, loss)
            if more:  # Q - W stands where nothing else is read any more
                torch.sub(rounded, before, out=w[own])

    def _push(self, w: Tensor, upper: Tensor, ranges: Ranges, codes: Tensor, values: Tensor, errors: Tensor, loss: Tensor) -> None:
        """Each block's errors off later columns; the loss is added to."""
        k = len(w)
        reach = Reach(self.reach, k)
        blocks = diagonal_blocks(upper, self.block_size) if upper.is_cuda and upper.stride(1) != 1 else None
        for start in range(0, k, self.block_size):
            end = min(start + self.block_size, k)
            affine, group = ranges(start, end, w)
            own = errors[reach.held(slice(start, end))]
            whole = len(values) == k
            out = SolvedBlock(codes[start:end], values[start:end] if whole else values[: end - start], own, loss)
            u = upper[start:end, start:end] if blocks is None else blocks[start // self.block_size]
            self.block_kernel.solve_block(w[start:end], u, affine, group, out, self.fits)
            if not getattr(self.block_kernel, "ADDS_LOSS", False):
                loss.add_(out.errors.square().sum(0))
            if (off := reach.after(start, end)) is not None:
                done, rest = off
                self.later.lazy_update(w[rest], upper[done, rest].T, errors[reach.held(done)], self.stack)


def diagonal_blocks(upper: Tensor, size: int) -> list[Tensor]:
    """Of `[K, K]`, `[size, size]` each and the last one what is left, with contiguous rows, which kernels take: whole ones by one copy."""
    (k, _), (down, across) = upper.shape, upper.stride()
    whole = k // size
    at = upper.storage_offset()
    packed = upper.as_strided((whole, size, size), (size * (down + across), down, across), at).contiguous()
    left = upper[whole * size :, whole * size :]
    return [*packed, *([left.contiguous()] if left.numel() else [])]


def by_columns(weights: Sequence[Tensor]) -> Tensor:
    """float32 `[K, N]` of weights `[N_i, K]` on a GPU, one after another; where loops are replayed, to be solved before others are laid
    out."""
    rows = [len(w) for w in weights]
    k, n, replays = weights[0].shape[1], sum(rows), replay.current()
    columns = weights[0].new_empty(k, n, dtype=torch.float32) if replays is None else replays.lent(weights[0], k, n)
    run = kernel("turned", device=columns.device).run
    for w, part in zip(weights, torch.split(columns, rows, dim=1), strict=True):
        run.turned(w.contiguous(), part)
    return columns


def by_rows(codes: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """uint8 `[N_i, K]` of codes `[K, N]`; on a GPU contiguous."""
    parts = torch.split(codes, list(rows), dim=1)
    if not codes.is_cuda:
        return [part.T for part in parts]
    run, made = kernel("turned", device=codes.device).run, []
    for part in parts:
        made.append(codes.new_empty(part.shape[1], len(codes)))
        run.turned(part, made[-1])
    return made


def stacks(weights: Sequence[Tensor]) -> bool:
    """Whether `solve_affine` gives weights `[N_i, K]` that are stacked the bits that they have alone: their rows fill whole vectors of 64
    bytes, so that libraries see them as aligned as alone, and no loop of torch on a CPU solves the blocks, where a number's rounding
    depends on its place in memory."""
    first = weights[0]
    if any(w.dtype is not first.dtype or w.shape[0] * w.element_size() % 64 for w in weights):
        return False
    return first.device.type != "cpu" or kernel("gptq_block", device=first.device).backend != "torch"


def block_within(group: int) -> int:
    """Columns of a block, such that groups begin where blocks do: the largest divisor of `group` up to 128."""
    return next(b for b in range(min(group, 128), 0, -1) if group % b == 0)


def solve_columns(weight: Tensor, upper: Tensor, block_size: int, round_column: RoundColumn) -> Solved:
    """Rounds the columns of `[K, N]` in order. The weight is not changed. `block_size` only says how late the columns
    of later blocks are updated."""

    def solve_block(start: int, weights: list[Tensor], u: Tensor, outs: list[SolvedBlock]) -> None:
        [w], [out] = weights, outs
        block = w[start : start + len(u)].clone()
        diagonal: list[float] = u.diagonal().tolist()
        for i in range(len(block)):
            out.codes[i], q = round_column(start + i, block[i], w)
            out.values[i] = q
            torch.sub(block[i], q, out=out.errors[i]).div_(diagonal[i])
            block[i + 1 :].addr_(u[i, i + 1 :], out.errors[i], alpha=-1)

    return solve_blocks([weight], upper, block_size, solve_block)[0]


def to_work_on(weight: Tensor) -> Tensor:
    """A copy of a matrix. Kernels for GPUs take contiguous rows; on a CPU a sum's order follows the strides, and what is stored has always
    followed theirs."""
    return weight.clone(memory_format=torch.contiguous_format if weight.is_cuda else torch.preserve_format)


SolveBlock = Callable[[int, list[Tensor], Tensor, list[SolvedBlock]], None]
"""(start, weights `[K, N_i]`, factor `[B, B]`, where to write each). The weights hold the updates of all finished blocks; those of the
block at work may be changed."""


def solve_blocks(
    weights: Sequence[Tensor], upper: Tensor, block_size: int, solve_block: SolveBlock, looks_ahead: bool = True
) -> list[Solved]:
    """Rounds the blocks of columns of weights `[K, N_i]` in order, that of all weights at once: each as alone, bit for bit. The weights
    given are not changed. looks_ahead: as in `solve_affine`, of `solve_block`."""
    works = [to_work_on(w) for w in weights]
    later, k = kernel("lazy_update", device=upper.device, later=works[0]), len(upper)
    made = [Solved(torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w), torch.zeros_like(w[0]), list(later.notes)) for w in works]
    reach = Reach(block_size if looks_ahead else later.run.reach(block_size, upper.device), k)
    errors = [torch.empty_like(w[: reach.size]) for w in works]
    for start in range(0, k, block_size):
        end = min(start + block_size, k)
        own = reach.held(slice(start, end))
        outs = [SolvedBlock(m.codes[start:end], m.values[start:end], e[own]) for m, e in zip(made, errors, strict=True)]
        solve_block(start, works, upper[start:end, start:end], outs)
        off = reach.after(start, end)
        for w, m, e, out in zip(works, made, errors, outs, strict=True):
            m.loss.add_(out.errors.square().sum(0))
            if off is not None:
                done, rest = off
                later.run.lazy_update(w[rest], upper[done, rest].T, e[reach.held(done)])
    return made
