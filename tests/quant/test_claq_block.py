"""A block of CLAQ's columns: the twins for a CPU agree bit for bit, whatever the types, widths and ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.kernels import kernel
from quant.kernels.claq_block import Found, SolvedBlock, Wanted, refuse
from quant.kernels.kmeans_columns import STARTS
from quant.methods.claq import tails
from tests.quant.plain_loop import poisoned
from tests.quant.test_kmeans import SHAPES, columns

STORED = (torch.float32, torch.float16, torch.bfloat16)


def factor(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An upper triangle inside a larger one, as the solver passes it."""
    g = torch.Generator().manual_seed(count)
    whole = 0.3 * torch.randn(count + 3, count + 3, generator=g, dtype=torch.float64).triu(1) + torch.eye(count + 3).double()
    return whole.to(dtype)[2 : 2 + count, 2 : 2 + count]


def solved(run: Any, x: Tensor, upper: Tensor, wanted: Wanted) -> tuple[SolvedBlock, Found]:
    out = poisoned(x)
    return out, run.solve_block(x.clone(), upper, wanted, out)


def equal(got: tuple[SolvedBlock, Found], want: tuple[SolvedBlock, Found]) -> bool:
    kept, there = got[1].kept, want[1].kept
    same = [torch.equal(getattr(got[0], name), getattr(want[0], name)) for name in ("codes", "values", "errors")]
    return all(same) and torch.equal(got[1].tables, want[1].tables) and (there is None if kept is None else torch.equal(kept, there))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    n=st.sampled_from([1, 2, 3, 5, 40, 130, 257]),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    stored=st.sampled_from(STORED),
    start=st.sampled_from(STARTS),
    fraction=st.sampled_from([None, 0.004, 0.014]),
    scale=st.sampled_from([1e-6, 1.0, 1e5]),
    given_centres=st.booleans(),
)
def test_the_cpp_and_torch_twins_give_equal_bits(
    shape: str,
    n: int,
    widths: list[int],
    dtype: torch.dtype,
    stored: torch.dtype,
    start: str,
    fraction: float | None,
    scale: float,
    given_centres: bool,
) -> None:
    run, plain = kernel("claq_block"), kernel("claq_block", "torch").run
    if run.backend != "cpu":
        pytest.skip(run.notes[0])
    x = scale * columns(shape, n, seed=n, count=len(widths), dtype=dtype)
    ends = None if fraction is None else [tails(n, fraction * (1 + j % 3)) for j in range(len(widths))]
    centres = scale * columns("normal", 2 ** max(widths), 1, len(widths), dtype).sort(1).values if given_centres else None
    wanted, upper = Wanted(widths, ends, stored, start, centres), factor(len(widths), dtype)
    try:
        want = solved(plain, x, upper, wanted)
    except ScaleDtypeError as e:
        with pytest.raises(ScaleDtypeError, match=str(e)):
            solved(run.run, x, upper, wanted)
        return
    assert equal(solved(run.run, x, upper, wanted), want)


def test_a_long_block_gives_equal_bits() -> None:
    """Sums of 128 errors, in the one order."""
    x, upper = columns("heavy", 300, count=128), factor(128) * 0.1 + 0.9 * torch.eye(128)
    wanted = Wanted([2, 3] * 64, [tails(300, 0.014)] * 128, torch.float16, "partition")
    want = solved(kernel("claq_block", "torch").run, x, upper, wanted)
    assert equal(solved(kernel("claq_block").run, x, upper, wanted), want)
    assert want[1].kept is not None
    assert int(want[1].kept.sum(1).max()) == sum(tails(300, 0.014))


@pytest.mark.parametrize("stored", STORED[1:])
def test_every_float16_and_what_lies_around_it_is_kept_as_torch_casts_it(stored: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.int16).view(torch.float16).float()
    every = every[every.isfinite()]
    x = torch.cat([every, torch.nextafter(every, torch.tensor(0.0)), (every[1:] + every[:-1]) / 2])[None]
    wanted = Wanted([1], [(x.numel() // 2, x.numel() // 2)], stored, "partition")
    want = solved(kernel("claq_block", "torch").run, x, torch.eye(1), wanted)
    assert equal(solved(kernel("claq_block").run, x, torch.eye(1), wanted), want)
    assert want[1].kept is not None
    assert float(want[1].kept.float().mean()) > 0.9


def test_centres_that_are_given_are_those_rounded_to_and_must_be_like_the_block() -> None:
    x, centres = columns("normal", 30, count=2), torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-2.0, 2.0, 9.0, 9.0]])
    for backend in ("auto", "torch"):
        out, found = solved(kernel("claq_block", backend).run, x, torch.eye(2), Wanted([2, 1], None, torch.float32, "partition", centres))
        assert found.tables.tolist() == [[-1.0, 0.0, 1.0, 2.0], [-2.0, 2.0, 0.0, 0.0]]
        assert torch.equal(out.values, torch.stack([x[0].round().clamp(-1, 2), x[1].sign() * 2]))
    if kernel("claq_block").backend == "cpu":
        for wrong in (centres[:, :2], centres.double(), centres.T.contiguous().T):
            with pytest.raises(ValueError, match=r"centres are .*; they must be contiguous, \(2, 4\), torch.float32 and on cpu"):
                solved(kernel("claq_block").run, x, torch.eye(2), Wanted([2, 1], None, torch.float32, "partition", wrong))


def test_what_does_not_fit_is_refused() -> None:
    for backend in ("auto", "torch"):
        run = kernel("claq_block", backend).run
        x = columns("normal", 60, count=2)
        x[1] *= 1e6
        with pytest.raises(ScaleDtypeError, match="a codebook does not fit float16"):
            solved(run, x, torch.eye(2), Wanted([2, 2], None, torch.float16, "partition"))
        x[1] /= 1e6
        x[1, :2] = torch.tensor([66000.0, 60000.0])  # one centre between them
        with pytest.raises(ScaleDtypeError, match="reserved weights do not fit float16"):
            solved(run, x, torch.eye(2), Wanted([1, 1], [(1, 0)] * 2, torch.float16, "partition"))
    with pytest.raises(ScaleDtypeError, match="reserved weights do not fit float16"):
        refuse(torch.tensor([False, True]))
    refuse(torch.tensor([False, False]))
