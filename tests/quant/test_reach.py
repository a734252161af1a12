"""Errors reach every later column once, before its block is solved, however far a reach goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels.braq_block import Solve
from quant.kernels.braq_block import eager as braq_block
from quant.kernels.lazy_update import eager
from quant.methods.billm import Billm
from quant.methods.claq import Claq
from quant.methods.gptq import Gptq
from quant.scheme import Granularity, WeightScheme
from quant.solver import Reach
from quant.statistics import Statistics


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_each_column_gets_each_error_once_and_in_time(k: int, block: int, blocks: int) -> None:
    reach = Reach(block * blocks, k)
    taken = torch.zeros(k, k, dtype=torch.int64)
    for start in range(0, k, block):
        end = min(start + block, k)
        assert (taken[:start, start:end] == 1).all(), "errors of all finished blocks"
        assert reach.held(slice(start, end)) == slice(start % reach.size, start % reach.size + end - start)
        if (off := reach.after(start, end)) is not None:
            done, rest = off
            assert 0 < done.stop - done.start <= reach.size
            taken[done, rest] += 1
    first = torch.arange(k) // block * block
    assert torch.equal(taken, (torch.arange(k)[:, None] < first).long())


def in_one_memory(solver: Callable[..., Solve]) -> Callable[..., Solve]:
    """As the twin for GPUs has it: a block's errors are overwritten by the next one's."""

    def made(weight: Tensor, *more: Any) -> Solve:
        solve, memory = solver(weight, *more), torch.empty_like(weight)

        def into(start: int) -> Tensor:
            errors = solve(start)
            memory.fill_(torch.nan)
            return memory[:, : errors.shape[1]].copy_(errors)

        return into

    return made


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        (Gptq(block_size=8, static_groups=True), WeightScheme(4, granularity=Granularity.GROUP, group_size=8)),
        (Gptq(block_size=8), WeightScheme(4, granularity=Granularity.GROUP, group_size=24)),
        (Gptq(block_size=8, act_order=True), WeightScheme(4, granularity=Granularity.GROUP, group_size=24)),
        (Claq(block_size=8), WeightScheme(2)),
        (Billm(block_size=8), WeightScheme(1)),
    ],
)
def test_results_do_not_depend_on_the_reach(method: Any, scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 24 columns go beyond a reach of 16: their ranges are found from weights that lack no error."""
    g = torch.Generator().manual_seed(2)
    w, x = (torch.randn(n, 72, generator=g, dtype=torch.float64) for n in (24, 300))
    statistics = Statistics(hessian=x.T @ x)
    near = method.quantize(w, statistics, scheme).tensor
    monkeypatch.setattr(eager, "reach", lambda block, device: 2 * block)
    monkeypatch.setattr(braq_block, "solver", in_one_memory(braq_block.solver))
    far = method.quantize(w, statistics, scheme).tensor
    # Rounding apart, 1e-15 of a weight, they are the same numbers.
    torch.testing.assert_close(far.dequantize(), near.dequantize(), rtol=1e-9, atol=1e-12)
