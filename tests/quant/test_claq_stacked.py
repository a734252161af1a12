"""Linears that read one input, rounded side by side: what each has alone, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.kernels import kernel, on_cuda
from quant.kernels.claq_block import Found, Part, SolvedBlock, Wanted, cuda, solve_blocks
from quant.methods.claq import Claq, tails
from quant.scheme import WeightScheme
from quant.statistics import Statistics
from tests.quant.cuda_on_host import on_the_host
from tests.quant.stacking import are_alone
from tests.quant.test_claq_block import equal, factor, solved
from tests.quant.test_kmeans import columns

K = 40
TWO, FULL = WeightScheme(2), WeightScheme(2, scale_dtype="float32")
SCHEMES = {"one": [TWO] * 3, "bits": [TWO, replace(TWO, bits=4), replace(TWO, bits=3)], "types": [TWO, FULL, replace(TWO, symmetric=True)]}
METHODS = {
    "plain": (Claq(block_size=16), "bits"),
    "types": (Claq(act_order=False, block_size=16, kmeans_start="partition"), "types"),
    "mixed": (Claq(adaptive_bits=2.2, outlier_reservation=True, score="hessian", block_size=16), "one"),
    "corrected": (Claq(outlier_reservation=True, variant="corrected"), "types"),
    "batched": (Claq(codebooks="batched", block_size=16), "bits"),
}
on_a_gpu = pytest.mark.gpu("nvcc")


def given(rows: Sequence[int] = (140, 35, 90), k: int = K, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Statistics]:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(8 * k, k, generator=g) @ (torch.eye(k) + 0.1 * torch.randn(k, k, generator=g))
    x[:, 7] = 0  # an input that never fires
    return [torch.randn(n, k, generator=g).to(dtype) for n in rows], Statistics(hessian=x.T @ x)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_is_what_it_are_alone(name: str, dtype: torch.dtype) -> None:
    method, schemes = METHODS[name]
    weights, statistics = given(dtype=dtype)
    are_alone(method, weights, statistics, SCHEMES[schemes])


@on_a_gpu
@pytest.mark.parametrize("name", METHODS)
def test_each_is_what_it_is_alone_on_a_gpu(name: str) -> None:
    """Rows as queries, keys and values of a grouped model have them, and a linear of another kind of launch; columns of several blocks."""
    method, schemes = METHODS[name]
    weights, statistics = given((2048, 512, 512, 5000), 288)
    there = Statistics(hessian=None if statistics.hessian is None else statistics.hessian.cuda())
    are_alone(replace(method, block_size=128), [w.cuda() for w in weights], there, [*SCHEMES[schemes], TWO])


def parts_of(rows: Sequence[int], widths: list[list[int]], fraction: float | None, start: str, centres: bool) -> list[Part]:
    parts = []
    for i, (n, own) in enumerate(zip(rows, widths, strict=True)):
        x = columns("normal", n, count=len(own), seed=i)
        ends = None if fraction is None else [tails(n, fraction)] * len(own)
        table = columns("normal", 2 ** max(own), i, len(own)).sort(1).values if centres else None
        parts.append(Part(x, Wanted(own, ends, (torch.float16, torch.float32)[i % 2], start, table), SolvedBlock.like(x)))
    return parts


def alone_and_together(run: Any, parts: list[Part], upper: Tensor) -> None:
    want = [solved(run, part.block, upper, part.wanted) for part in parts]
    found: list[Found] = solve_blocks(run, [replace(part, block=part.block.clone()) for part in parts], upper)
    assert all(equal((part.out, f), alone) for part, f, alone in zip(parts, found, want, strict=True))
    assert all(torch.equal(f.wrong, alone[1].wrong) for f, alone in zip(found, want, strict=True) if f.wrong is not None)


CASES: dict[str, Any] = {
    # Two kinds of launches by rows; columns enough for two blocks of threads that take errors off.
    "rows": ([513, 4700, 30, 600], [[1] * 19] * 4, None, "plus_plus", False),
    "widths": ([300, 40, 513], [[2, 4, 3], [3, 1, 1], [4, 2, 2]], 0.014, "partition", False),
    "given": ([513, 30], [[2, 3, 1], [1, 2, 4]], 0.014, "partition", True),
    "many": ([20] * (cuda.MOST_PARTS + 2), [[1, 2]] * (cuda.MOST_PARTS + 2), None, "plus_plus", False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", "torch", "host"])
def test_blocks_side_by_side(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(*CASES[case])
    upper = factor(len(parts[0].block))
    if backend != "host":
        alone_and_together(kernel("claq_block", backend).run, parts, upper)
        return
    on_the_host("claq_block", monkeypatch)
    alone_and_together(cuda, parts, upper)


@on_a_gpu
@pytest.mark.parametrize("case", CASES)
def test_blocks_side_by_side_on_a_gpu(case: str) -> None:
    parts = [
        Part(p.block.cuda(), replace(p.wanted, centres=None if p.wanted.centres is None else p.wanted.centres.cuda()), SolvedBlock.like(b))
        for p in parts_of(*CASES[case])
        for b in [p.block.cuda()]
    ]
    alone_and_together(kernel("claq_block", "cuda", "cuda").run, parts, factor(len(parts[0].block)).cuda())


def test_linears_of_one_kind_share_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_host("claq_block", monkeypatch)
    call, counts = on_cuda.call, list[int]()

    def counted(*more: Any) -> None:
        counts.append(more[6])
        call(*more)

    monkeypatch.setattr(on_cuda, "call", counted)
    parts = [*parts_of(*CASES["rows"]), *parts_of([40], [[1] * 19], None, "plus_plus", True)]
    cuda.solve_blocks(parts, factor(19))
    wide = parts_of([30, 40], [[1], [1]], None, "plus_plus", False)
    double = replace(wide[1], block=wide[1].block.double(), out=SolvedBlock.like(wide[1].block.double()))
    assert len(cuda.solve_blocks([wide[0], double], torch.eye(1))) == 2
    assert counts == [3, 1, 1, 1]


def test_what_is_not_taken_together() -> None:
    weights, _ = given()
    assert not Claq(layer_bits=(("*", 3.0),)).stacks(weights, SCHEMES["one"]), "bits go by names"
    assert not Claq(adaptive_bits=2.2).stacks(weights, SCHEMES["bits"]), "one does not fit, and is to be named"
    assert not Claq().stacks([*weights[:2], weights[2].double()], SCHEMES["one"])


def test_a_type_that_does_not_hold_one_of_them_is_said() -> None:
    weights, statistics = given()
    weights[1] *= 1e7
    with pytest.raises(ScaleDtypeError):
        Claq().quantize_stacked(weights, statistics, SCHEMES["one"])
