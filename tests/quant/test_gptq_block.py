"""The twins of the GPTQ block loop give what the plain loop gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.factors import inverse_factor
from quant.grids import GRIDS, fit, fit_unchecked, unfit_float16
from quant.kernels import TABLE, kernel
from quant.kernels.gptq_block import GRID_NUMBERS, KINDS, Fit, Fits, SolvedBlock, stacked
from quant.solver import solve_affine
from tests.quant.plain_loop import poisoned

TWINS = [b for b in TABLE["gptq_block"] if b not in ("reference", "triton")]
"""Triton's interpreter takes too long for these sizes: test_triton.py."""


def problem(rows: int, columns: int, grid: str, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Affine, list[int]]:
    """Weights `[B, N]`, factor, ranges of groups of 16 columns."""
    g = torch.Generator().manual_seed(rows * columns + bits)
    w = torch.randn(columns, rows, generator=g, dtype=dtype)
    x = torch.randn(3 * columns, columns, generator=g, dtype=dtype)
    upper, _ = inverse_factor(x.T @ x, 0.01)
    ranges = fit(GRIDS[grid], w.T.reshape(rows, columns // 16, 16), bits, torch.float32)
    affine = Affine(ranges.scale[..., 0].T.contiguous(), ranges.zero[..., 0].T.contiguous(), bits, GRIDS[grid].zero)
    return w, upper, affine, [j // 16 for j in range(columns)]


def with_odd_numbers(kind: ZeroKind) -> tuple[Tensor, Tensor, Affine, list[int]]:
    """Rows with one such number each, beside a plain one: NaN, infinity, 0, far too large or small, in weights, scales and zeros."""
    odd = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42, -1e-42, 1e-30, 1e-20, 1e20, -1e30, 3e38, 3e7, -3e7]
    g = torch.Generator().manual_seed(3)
    rows = 3 * len(odd) + 1
    w, _, _, group = problem(rows, 48, "g_asym", 3, torch.float32)
    tops = torch.tensor([3.0, 7.0, 255.0]).repeat(rows)[:rows]
    _, upper, _, _ = problem(4, 48, "g_asym", 3, torch.float32)
    scale, zero = torch.rand(3, rows, generator=g) + 0.1, torch.randint(0, 8, (3, rows), generator=g).float()
    for i, x in enumerate(odd):
        w[5 + i % 3, i] = x
        scale[1, len(odd) + i] = x
        zero[1, 2 * len(odd) + i] = x
    affine = Affine(scale, zero, 8, kind, tops)
    return w, upper, affine, group


SolveBlock = Callable[[Tensor, Tensor, Affine, list[int]], SolvedBlock]
STACKS = [
    ("g_asym", (32, 32, 32)),
    ("g_asym", (64, 32, 64)),
    ("g_asym", (16, 64, 8)),
    ("hqq", (64, 32, 64)),
    ("kivi", (16, 64, 8)),
]
"""Grid, and columns of a group in each of three configurations. The first two have one form in CUDA C++, the others another."""


def rows_need_no_others(
    solve: SolveBlock, grid: str, widths: tuple[int, ...], columns: int = 64, rows: tuple[int, int, int] = (11, 12, 13)
) -> None:
    """Configurations of 2, 8 and 3 bits in one call, in the order of rows and in another: each row as it is apart, bit for bit."""
    parts, apart = [], []
    _, upper, _, _ = problem(1, columns, grid, 4, torch.float32)
    for width, bits, n in zip(widths, (2, 8, 3), rows, strict=True):
        w = torch.randn(columns, n, generator=torch.Generator().manual_seed(bits))
        ranges = fit(GRIDS[grid], w.T.reshape(n, columns // width, width), bits, torch.float32)
        affine = Affine(ranges.scale[..., 0].T.contiguous(), ranges.zero[..., 0].T.contiguous(), bits, GRIDS[grid].zero)
        parts.append((w, affine, [j // width for j in range(columns)]))
        apart.append(solve(w, upper, affine, parts[-1][2]))
    block = torch.cat([w for w, _, _ in parts], 1)
    affine, group = stacked([(affine, group) for _, affine, group in parts])
    assert affine.tops is not None
    assert len(affine.scale) == columns // min(widths)
    order = torch.randperm(block.shape[1], generator=torch.Generator().manual_seed(9))
    moved = Affine(affine.scale[:, order], affine.zero[:, order], affine.bits, affine.kind, affine.tops[order])
    together, permuted = solve(block, upper, affine, group), solve(block[:, order].contiguous(), upper, moved, group)
    for name in ("codes", "values", "errors"):
        want = torch.cat([getattr(solved, name) for solved in apart], 1)
        assert torch.equal(getattr(together, name), want), name
        assert torch.equal(getattr(permuted, name), want[:, order]), name
    # What would not be seen if tops were left out.
    assert {int(solved.codes.max()) for solved in apart} == {3, 255, 7}


@pytest.mark.parametrize("backend", ["reference", *TWINS])
@pytest.mark.parametrize(("grid", "widths"), STACKS)
def test_stacked_configurations_are_solved_as_apart(backend: str, grid: str, widths: tuple[int, ...]) -> None:
    reason = _unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    # torch rounds the numbers that a vector does not fill otherwise: there it is so for multiples of 64 bytes.
    rows = (16, 32, 16) if backend == "torch" else (11, 12, 13)
    rows_need_no_others(kernel("gptq_block", backend).run.solve_block, grid, widths, rows=rows)


def test_equal_bits_and_groups_are_stacked_as_they_are() -> None:
    _, _, affine, group = problem(5, 48, "g_asym", 3, torch.float32)
    both, groups = stacked([(affine, group), (affine, group)])
    assert both.tops is None
    assert groups == group
    assert torch.equal(both.scale, affine.scale.repeat(1, 2))


SolveFound = Callable[[Tensor, Tensor, Affine, list[int], SolvedBlock | None, Fits | None], SolvedBlock]
WHOLE = tuple(name for name in GRID_NUMBERS if GRIDS[name].zero not in KINDS)
FOUND = [WHOLE, ("hqq",) * 3, ("kivi",) * 3]
"""Grids of the parts that one launch takes: all with whole zeros, which have one kind."""


def ranges_are_found(solve: SolveFound, grids: tuple[str, ...], columns: int = 64, smallest: int = 16, rows: int = 6) -> None:
    """Parts with grids, bits, types and widths of their own, and one with its ranges given, in one launch: scales and zeros are those of
    `quant.grids`, and all else is what a launch gives with these, bit for bit. What is odd is counted."""
    cases = [(grid, 2 + i % 7, i % 2 == 1, smallest << i % 3) for i, grid in enumerate(grids)]
    cases.append((grids[0], 3, False, 0))
    upper = problem(1, max(columns, 16), "g_asym", 4, torch.float32)[1][:columns, :columns]
    g = torch.Generator().manual_seed(columns)
    # One row of zeros, one of equal values, one without negative ones.
    blocks = [torch.randn(columns, rows + i, generator=g) / 4 for i in range(len(cases))]
    if grids[0] in WHOLE:
        for w in blocks:
            w[:, 0], w[:, 1], w[:, 2] = 0, 0.3, w[:, 2].abs()
    parts = []
    for (grid, bits, half, width), w in zip(cases, blocks, strict=True):
        size = width or columns
        made = fit(GRIDS[grid], w.T.reshape(w.shape[1], columns // size, size), bits, torch.float16 if half else torch.float32)
        affine = Affine(made.scale[..., 0].T.contiguous(), made.zero[..., 0].T.contiguous(), bits, GRIDS[grid].zero)
        parts.append((affine, [j // size for j in range(columns)]))
    block, (given, group) = torch.cat(blocks, 1), stacked(parts)
    assert len(given.scale) == columns // smallest
    fits = Fits.of([Fit(w.shape[1], width, grid, bits, half) for (grid, bits, half, width), w in zip(cases, blocks, strict=True)], w.device)

    def found(block: Tensor) -> tuple[Affine, SolvedBlock, int]:
        known = fits.words == 0
        scale, zero = (torch.where(known, t, torch.nan) for t in (given.scale, given.zero))
        affine = Affine(scale, zero, given.bits, given.kind, given.tops)
        fits.odd.zero_()
        solved = solve(block, upper, affine, group, poisoned(block), fits)
        return affine, solved, int(fits.odd)

    want = solve(block, upper, given, group, None, None)
    affine, solved, odd = found(block)
    assert odd == 0
    assert torch.equal(affine.scale, given.scale)
    assert torch.equal(affine.zero, given.zero)
    for name in ("codes", "values", "errors"):
        assert torch.equal(getattr(solved, name), getattr(want, name)), name
    # Not finite, of float32; too small and too large for float16; least value 0.
    wrong = [w.clone() for w in blocks]
    wrong[0][1, 3], wrong[0][2, 4], wrong[0][columns - 1, 4] = torch.nan, torch.inf, -torch.inf
    wrong[1][:, 3:5] *= torch.tensor([1e-9, 1e9])
    wrong[2][:, 3] = wrong[2][:, 3].abs() - wrong[2][:, 3].abs().amin()
    odd = 0
    for (grid, bits, half, width), w in zip(cases[:-1], wrong, strict=False):
        groups = w.T.reshape(-1, width)
        unfit = unfit_float16(fit_unchecked(GRIDS[grid], groups, bits, torch.float16), groups)[:, 0] if half else torch.tensor(False)
        either = (groups.amin(1) == 0) if GRIDS[grid].zero in KINDS else torch.tensor(False)
        odd += int((~torch.isfinite(groups).all(1) | unfit | either).sum())
    assert odd > 3
    assert found(torch.cat(wrong, 1))[2] == odd


def test_ranges_that_do_not_fit_are_refused() -> None:
    w, _, affine, _ = problem(4, 32, "g_asym", 4, torch.float32)
    for width, rows in ((12, 4), (16, 3)):
        with pytest.raises(ValueError, match="do not fit a block"):
            Fits.of([Fit(rows, width)], w.device).check(w, affine)
    fits = Fits.of([Fit(4, 16)], w.device)
    for views in ((affine.scale.double(), affine.zero), (affine.scale, affine.zero[:, ::2])):
        with pytest.raises(ValueError, match="must be contiguous"):
            fits.check(w, Affine(*views, 4, affine.kind))
    with pytest.raises(ValueError, match="float32 blocks"):
        fits.check(w.double(), affine)


@pytest.mark.parametrize("backend", ["reference", *TWINS])
@pytest.mark.parametrize("grids", FOUND, ids=lambda grids: grids[-1])
def test_ranges_are_found_in_the_launch(backend: str, grids: tuple[str, ...]) -> None:
    reason = _unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    ranges_are_found(kernel("gptq_block", backend).run.solve_block, grids)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twins_equal_the_plain_loop(backend: str, grid: str, dtype: torch.dtype) -> None:
    reason = _unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    for rows, columns, bits in ((1, 16, 2), (31, 48, 3), (33, 128, 4), (64, 16, 8)):
        w, upper, affine, group = problem(rows, columns, grid, bits, dtype)
        before = w.clone()
        want = kernel("gptq_block", "reference").run.solve_block(w, upper, affine, group)
        got = kernel("gptq_block", backend).run.solve_block(w, upper, affine, group)
        assert torch.equal(w, before)
        # A fused multiply-add in one of them may move a weight across the middle between two codes, which in turn moves later ones.
        same = got.codes == want.codes
        assert same.double().mean() >= 0.999
        rows_alike = same.all(0)
        bound = 1e-4 if dtype is torch.float32 else 1e-12
        assert torch.allclose(
            got.errors[:, rows_alike], want.errors[:, rows_alike], rtol=bound, atol=bound * float(want.errors.abs().max())
        )
        assert torch.equal(got.values[:, rows_alike], want.values[:, rows_alike])


@pytest.mark.parametrize("backend", list(TABLE["gptq_block"]))
def test_loss_is_the_output_error(backend: str) -> None:
    """Σ e² = tr((W - Q) H (W - Q)ᵀ), whatever the blocks; 1e-10 in float64."""
    reason = _unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    w, _, affine, group = problem(9, 64, "g_asym", 3, torch.float64)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    h = x.T @ x
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    upper, _ = inverse_factor(h, 0.01)

    def ranges(start: int, end: int, weights: Tensor) -> tuple[Affine, list[int]]:
        return affine, group[start:end]

    losses = []
    for block_size in (5, 32, 64):
        solved = solve_affine(w, upper, block_size, ranges, backend)
        d = (w - solved.values).T
        assert torch.allclose(solved.loss, ((d @ damped) * d).sum(1), rtol=1e-10)
        losses.append(solved.loss)
    assert torch.allclose(losses[0], losses[2], rtol=1e-10)


@pytest.mark.parametrize("backend", list(TABLE["gptq_block"]))
def test_memory_of_another_block_is_written_over(backend: str) -> None:
    reason = _unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    w, upper, affine, group = problem(33, 48, "g_asym", 3, torch.float32)
    run = kernel("gptq_block", backend).run.solve_block
    want = run(w, upper, affine, group)
    given = poisoned(w)
    assert run(w, upper, affine, group, given) is given
    for got, made in ((given.codes, want.codes), (given.values, want.values), (given.errors, want.errors)):
        assert torch.equal(got, made)


def test_numbers_far_outside_the_codes_are_clamped() -> None:
    """Also where a whole number no longer fits the float's mantissa."""
    w = torch.tensor([[1e30, -1e30, 3e7, -3e7, 0.5, 1.5, 2.5, -0.5]])
    affine = Affine(torch.ones(1, 8), torch.full((1, 8), 4.0), 3, GRIDS["g_sym"].zero)
    for backend in TABLE["gptq_block"]:
        if _unavailable(backend) is None:
            solved = kernel("gptq_block", backend).run.solve_block(w, torch.eye(1), affine, [0])
            assert solved.codes.tolist() == [[7, 0, 7, 0, 4, 6, 6, 4]]


def _unavailable(backend: str) -> str | None:
    try:
        kernel("gptq_block", backend)
    except RuntimeError as e:
        return str(e)
    return None
