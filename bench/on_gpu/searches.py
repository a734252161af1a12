"""The searches of CLAQ and BiLLM on a GPU: k-means of columns, plain and weighed, CLAQ's blocks and linears, and of a block of BiLLM's
the salient columns and threshold, and all of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.on_gpu.clock import Bench, Goal, Row, known, spread, worst
from quant.kernels import kernel
from quant.kernels.braq_block import Binarized
from quant.kernels.braq_block import Wanted as BlockWanted
from quant.kernels.braq_block.eager import masks, reference_quantiles
from quant.kernels.claq_block import Part, SolvedBlock, Wanted, solve_blocks
from quant.methods.claq import Claq
from quant.scheme import WeightScheme
from quant.statistics import Statistics


def searches(b: Bench) -> Iterator[Row]:
    name = "auto" if b.dry else "cuda"
    run, twin = (kernel("kmeans_columns", backend, b.device).run for backend in (name, "torch"))
    for count, n, start, weighed, goal in (
        (4096, 4096, "plus_plus", False, Goal(1e4)),
        (4096, 4096, "partition", False, Goal(1e4)),
        (4096, 4096, "plus_plus", True, None),
        (4096, 4096, "partition", True, None),
        (128, 4096, "plus_plus", False, None),
        (128, 11008, "partition", True, None),  # in device memory
        (1, 4096, "plus_plus", False, Goal(40.0)),
        (1, 4096, "partition", False, Goal(40.0)),
        (1, 11008, "plus_plus", False, Goal(40.0)),
        (1, 11008, "partition", False, Goal(40.0)),
    ):
        x = b.random(b.size(count, 2), b.size(n, 100))
        w = b.random(x.shape[1]).double().exp() if weighed else None
        fitted = run.kmeans(x, 16, start, w)
        # By what sums of squares are larger than those of the other twin, of some columns.
        some = spread(len(x), 8)
        ours, theirs = (_squares(x[some], c, w) for c in (fitted[some], twin.kmeans(x[some], 16, start, w)))
        took = b.time(lambda i: run.kmeans(x, 16, start, w))  # noqa: B023
        beside = dict(
            torch=b.once(lambda: twin.kmeans(x, 16, start, w)) if count < 4096 else None,  # noqa: B023
            codes=b.time(lambda i: run.nearest(x, fitted)),  # noqa: B023
        )
        worse = float((ours / theirs).max()) - 1
        kind = f"{start}, weighed" if weighed else start
        yield Row(f"kmeans_columns {tuple(x.shape)}, 16 centres, {kind}", worse, 1e-6, took, known(**beside), x.nbytes, goal)
    block, loop = (kernel("claq_block", backend, b.device).run for backend in (name, "torch"))
    for n, bits in ((4096, 2), (4096, 4), (11008, 2)) if not b.dry else ((40, 2),):
        x = b.random(b.size(128, 5), n)
        upper = (b.random(len(x), len(x)).triu(1) * 0.03 + torch.eye(len(x), device=b.device)).contiguous()
        wanted, out = Wanted([bits] * len(x), None, torch.float16, "plus_plus"), SolvedBlock.like(x)
        loop.solve_block(x.clone(), upper, wanted, out)
        errors = [float(out.errors.double().square().sum())]
        block.solve_block(x.clone(), upper, wanted, out)
        errors.append(float(out.errors.double().square().sum()))
        took = b.time(lambda i: block.solve_block(x.clone(), upper, wanted, out))  # noqa: B023
        peers = known(torch=b.once(lambda: loop.solve_block(x.clone(), upper, wanted, out)))  # noqa: B023
        # A tie of sums that went the other way changes a column by a few percent, one of 128.
        yield Row(f"claq_block, a block of {len(x)} columns of {n}, {bits} bits", abs(errors[1] / errors[0] - 1), 1e-3, took, peers)
    yield from _side_by_side(b)
    yield from _linears(b)
    search, plain = (kernel("braq_search", backend, b.device).run for backend in (name, "torch"))
    counts = range(1, 50)
    for n in (4096, 11008) if not b.dry else (40,):
        x = b.random(n, 128)
        thresholds = reference_quantiles(x.abs())
        squares = float(x.double().square().sum())
        left = [r.order_two_errors(x, counts) for r in (search, plain)]
        split = [r.split_errors(x, thresholds) for r in (search, plain)]
        error = worst(*(float((a - c).abs().max()) / squares for a, c in (left, split)))
        counted, parted = b.time(lambda i: search.order_two_errors(x, counts)), b.time(lambda i: search.split_errors(x, thresholds))  # noqa: B023
        whole = b.time(lambda i: masks(x, counts)) if not b.dry else None  # noqa: B023
        beside = dict(
            counts_alone=counted,
            splits_alone=parted,
            torch=b.once(lambda: (plain.order_two_errors(x, counts), plain.split_errors(x, thresholds))),  # noqa: B023
        )
        allowed = 2 * (128 + 20) * 2.0**-24
        goal = Goal(250.0) if n == 4096 else None
        yield Row(f"braq_search, all of a block's choices, {n} x 128", error, allowed, whole, known(**beside), x.nbytes, goal)
    yield from _blocks(b, name)


def _blocks(b: Bench, name: str) -> Iterator[Row]:
    """A block of BiLLM's columns from weights to errors, beside torch's form with the same searches."""
    for n in (4096, 11008) if not b.dry else (40,):
        x, upper = b.random(n, 128), torch.eye(128, device=b.device)
        wanted, made = BlockWanted(128, torch.float16), [Binarized.like(x, 128) for _ in range(2)]
        ours, plain = (
            kernel("braq_block", backend, b.device).run.solver(x, upper, wanted, out)
            for backend, out in zip((name, "torch"), made, strict=True)
        )
        ours(0), plain(0)
        # A value that lies as near its mean as that is rounded has either sign; a choice that went another way has many others.
        error = float((made[0].signs != made[1].signs).double().mean())
        took, peers = b.time(lambda i: ours(0)), known(torch=b.once(lambda: plain(0)))  # noqa: B023
        goal = Goal(250.0) if n == 4096 else None
        yield Row(f"braq_block, a block of BiLLM, {n} x 128", error, 1e-4, took, peers, x.nbytes, goal, launches=7)


def _side_by_side(b: Bench) -> Iterator[Row]:
    """Blocks of linears that have one factor, in the same launches."""
    run = kernel("claq_block", "auto" if b.dry else "cuda", b.device).run
    for count, n in ((3, 4096), (2, 11008)) if not b.dry else ((3, 40),):
        blocks = [b.random(b.size(128, 5), n) + i for i in range(count)]
        upper = (b.random(len(blocks[0]), len(blocks[0])).triu(1) * 0.03 + torch.eye(len(blocks[0]), device=b.device)).contiguous()
        wanted, outs = Wanted([2] * len(upper), None, torch.float16, "plus_plus"), [SolvedBlock.like(x) for x in blocks]

        def together() -> None:
            solve_blocks(run, [Part(x.clone(), wanted, out) for x, out in zip(blocks, outs, strict=True)], upper)  # noqa: B023

        def one_by_one() -> list[SolvedBlock]:
            made = [SolvedBlock.like(x) for x in blocks]  # noqa: B023
            for x, out in zip(blocks, made, strict=True):  # noqa: B023
                run.solve_block(x.clone(), upper, wanted, out)  # noqa: B023
            return made

        together()
        apart = one_by_one()
        differ = float(sum((a.errors != o.errors).sum() + (a.codes != o.codes).sum() for a, o in zip(apart, outs, strict=True)))
        took, peers = b.time(lambda i: together()), known(one_by_one=b.time(lambda i: one_by_one()))
        yield Row(f"claq_block, blocks of {len(upper)} columns of {n} of {count} linears side by side, 2 bits", differ, 0, took, peers)


def _linears(b: Bench) -> Iterator[Row]:
    """CLAQ of a linear with all codebooks from the weight as given, beside the published order, which fits in the loop."""
    n, k = b.size(4096, 40), b.size(4096, 24)
    weight, x = b.random(n, k), b.random(2 * k, k)
    hessian = x.T @ x
    for bits in (2, 4):
        scheme, batched, in_loop = WeightScheme(bits), Claq(codebooks="batched"), Claq()
        # Where nothing is fed back both fit the same columns; a tie of sums that went the other way changes one of them by a few percent.
        diagonal = Statistics(hessian=torch.diag(hessian.diagonal()))
        left = [float((m.quantize(weight, diagonal, scheme).tensor.dequantize() - weight).square().sum()) for m in (batched, in_loop)]
        full = Statistics(hessian=hessian)
        took = b.once(lambda: batched.quantize(weight, full, scheme))  # noqa: B023
        peers = known(
            in_loop=b.once(lambda: in_loop.quantize(weight, full, scheme)),  # noqa: B023
            codebooks_alone=b.once(lambda: kernel("kmeans_columns", device=b.device).run.kmeans(weight.T, 2**bits, "plus_plus")),  # noqa: B023
        )
        name = f"CLAQ of a linear of {n} x {k}, {bits} bits, batched codebooks (not the published order), Hessian's factor included"
        yield Row(name, abs(left[0] / left[1] - 1), 1e-3, took, peers, launches=0)


def _squares(x: Tensor, centres: Tensor, weights: Tensor | None) -> Tensor:
    squares = (x.double()[:, :, None] - centres.double()[:, None, :]).square().amin(2)
    return (squares if weights is None else weights * squares).sum(1)
