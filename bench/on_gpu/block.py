"""A block of the GPTQ solver on a GPU, one configuration and many stacked along rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from bench.on_gpu import peers
from bench.on_gpu.clock import COLD, Bench, Goal, Row, known
from quant.affine import Affine, ZeroKind
from quant.factors import inverse_factor
from quant.grids import GRIDS, fit
from quant.kernels import Kernel, kernel
from quant.kernels.gptq_block import Fit, Fits, SolvedBlock

GOALS = dict.fromkeys((4096, 8192, 12288, 16384), Goal(15.0))
GOALS |= {8 * one: Goal(times, "time", (f"one_of_{one}",)) for one, times in ((4096, 2.0), (12288, 5.0))}
"""Rows of a block ▸ goal."""


def block(b: Bench) -> Iterator[Row]:
    """The error is the share of wrong numbers: of codes alone in CUDA C++, which rounds sums otherwise than the reference; a thousandth of
    them may be others. Values are left out where a solver leaves them out; `with_values` writes them. Where the launch finds the ranges,
    `torch_ranges` is the launch with them given, and torch finding them before it, group by group."""
    ours, triton = (kernel("gptq_block", name, b.device) for name in (b.backend if b.dry else "auto", "triton"))
    columns = b.size(128, 16)
    x = b.random(4 * columns, columns)
    upper = inverse_factor(x.T @ x, 0.01)[0].contiguous()  # as a solver gives it: no call is to lay it out anew
    single: dict[int, float | None] = {}
    forms = {"one group": columns, "one group, found": columns, "groups of 32, found": 32, "groups of 16": 16}
    for rows, (form, width) in product((40,) if b.dry else GOALS, forms.items()):
        found = form.endswith("found")
        if form != "one group" and (width > columns if b.dry else rows not in (4096, 16384)):
            continue
        w = b.random(columns, rows)
        ranges = fit(GRIDS["g_asym"], w.T.reshape(rows, columns // width, width), 4, w.dtype)
        affine = Affine(ranges.scale[..., 0].T.contiguous(), ranges.zero[..., 0].T.contiguous(), 4, ZeroKind.CODE)
        group = [j // width for j in range(columns)]
        fits = Fits.of([Fit(rows, width, "g_asym", 4)], w.device) if found else None
        poisoned = [torch.full_like(t, torch.nan) for t in (affine.scale, affine.zero)]
        here = Affine(poisoned[0], poisoned[1], 4, ZeroKind.CODE) if found else affine
        # Each call has memory of its own, as a solver's has: block and errors at least.
        skips = getattr(ours.run, "SKIPS_VALUES", False)
        copies = [(w.clone(), SolvedBlock.like(w)) for _ in range(b.size(1 + int(COLD / (2 * w.nbytes)), 1))]

        def work(i: int, backend: Kernel, values: bool = True, **more: int) -> SolvedBlock:
            given, out = copies[i]  # noqa: B023
            out = out if values else replace(out, values=out.values[:0])
            solved: SolvedBlock = backend.run.solve_block(given, upper, here, group, out, fits, **more)  # noqa: B023
            return solved

        def torch_ranges() -> None:
            for at in range(0, columns, width):  # noqa: B023
                fit(GRIDS["g_asym"], w[at : at + width].T.contiguous(), 4, w.dtype)  # noqa: B023
            ours.run.solve_block(w, upper, affine, group, copies[0][1])  # noqa: B023

        got = work(0, ours)
        some = slice(0, rows, max(1, rows // 1024))
        few = Affine(affine.scale[:, some].cpu(), affine.zero[:, some].cpu(), 4, ZeroKind.CODE)
        want = kernel("gptq_block", "reference").run.solve_block(w[:, some].cpu(), upper.cpu(), few, group)
        fuses = ours.backend == "cuda"
        pairs = [(got.codes, want.codes), (here.scale, few.scale), (here.zero, few.zero)]
        pairs += [] if fuses else [(got.values, want.values), (got.errors, want.errors)]
        wrong = max(float((mine[:, some].cpu() != plain).double().mean()) for mine, plain in pairs)

        timed = partial(work, backend=ours, values=not skips)
        beside: dict[str, float | None] = {}
        if not b.dry:
            beside["triton"] = b.once(partial(work, 0, triton))
        if not b.dry and found:
            beside["torch_ranges"] = b.once(torch_ranges)
        if not b.dry and rows == 4096:
            beside["torch_loop"] = b.once(partial(work, 0, kernel("gptq_block", "torch", b.device)))
        if ours.backend == "cuda" and rows <= 16384:
            beside |= {f"lanes_{n}": b.time(partial(timed, lanes=n), len(copies)) for n in (1, 4)}
        if skips:
            beside["with_values"] = b.time(partial(work, backend=ours), len(copies))
        # Triton's twin copies the groups to the device, which no graph holds.
        took = b.time(timed, len(copies)) if ours.backend == "cuda" else b.once(partial(timed, 0))
        if form == "one group":
            single[rows] = took
        one = {f"one_of_{rows // 8}": single.get(rows // 8)}
        moved = sum(t.nbytes for t in (w, upper, got.codes, got.errors, *(() if skips else (got.values,))))
        sums = {"float32": float(columns * columns * rows)}
        name = f"gptq_block ({ours.backend}), {columns} columns x {rows}, {form}"
        others = peers.times(b, "block", rows if form == "one group" else 0, 128, 0, 4)
        yield Row(name, wrong, 1e-3 if fuses else 0.0, took, known(**beside, **one) | others, moved, None if b.dry else GOALS[rows], sums)
