"""k-means of columns against an exact solver, a plain loop, and NumPy's random numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels import TABLE, kernel, kmeans_columns
from quant.kernels.kmeans_columns import STARTS, draws, draws_on, trials
from quant.kernels.native import library

# Where there is no C++ compiler the torch twin is tested alone.
BACKENDS = ["cpu", "torch"] if kernel("kmeans_columns").backend == "cpu" else ["torch"]
SHAPES = ("normal", "heavy", "uniform", "two", "rounded", "one_far")


def columns(shape: str, n: int, seed: int = 0, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[count, N]`."""
    draw = np.random.RandomState(seed)
    x = draw.standard_normal((count, n))
    if shape == "heavy":
        x = draw.standard_t(2, (count, n))
    elif shape == "uniform":
        x = draw.uniform(size=(count, n))
    elif shape == "two":
        x = x + 6 * (draw.uniform(size=(count, n)) < 0.3)
    elif shape == "rounded":
        x = np.round(4 * x) / 4
    elif shape == "one_far":
        x[:, 0] = 1e4
    return torch.from_numpy(x).to(dtype)


def squared_error(x: Tensor, centres: Tensor) -> Tensor:
    """`[C]`: by brute force over all centres."""
    return (x.double()[:, :, None] - centres.double()[:, None, :]).square().amin(2).sum(1)


def exact(x: Tensor, k: int, weights: Tensor | None = None) -> float:
    """Least (weighted) squared error of one column with k centres: dynamic programming over all cuts of the sorted values. Optimal
    clusters are runs of sorted values (Fisher 1958)."""
    order = np.argsort(x.double().numpy(), kind="stable")
    v = x.double().numpy()[order]
    w = np.ones(len(v)) if weights is None else weights.double().numpy()[order]
    v = v - v.mean()
    n = len(v)
    m, s, q = (np.concatenate([[0], t.cumsum()]) for t in (w, w * v, w * v * v))
    a, b = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(b > a, (q[b] - q[a]) - (s[b] - s[a]) ** 2 / (m[b] - m[a]), np.where(a == b, 0.0, np.inf))
    least = cost[0]
    for _ in range(k - 1):
        least = (least[:, None] + cost).min(0)
    return max(float(least[n]), 0.0)


def is_fixed_point(x: Tensor, centres: Tensor) -> None:
    """Each centre is the mean of the values nearest to it."""
    for column, row in zip(x.double(), centres.double(), strict=True):
        codes = (column[:, None] - row[None, :]).abs().argmin(1)
        for c in codes.unique():
            torch.testing.assert_close(row[c], column[codes == c].mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_a_partition_start_is_close_to_the_exact_optimum(backend: str, shape: str, k: int) -> None:
    run = kernel("kmeans_columns", backend).run
    x = columns(shape, 300, seed=k)
    found = squared_error(x, run.kmeans(x, k, "partition"))
    for column, error in zip(x, found, strict=True):
        best = exact(column, k)
        # Never below the optimum (centres are rounded to float32: 1e-6), and one percent above it at most: 300 values in 64 + 4k bins.
        assert best * (1 - 1e-6) - 1e-9 <= float(error) <= 1.01 * best + 1e-9


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_partitions_end_at_a_fixed_point_and_both_starts_below_their_first_error(backend: str, start: str) -> None:
    run = kernel("kmeans_columns", backend).run
    for shape in SHAPES:
        x = columns(shape, 500, dtype=torch.float64)
        centres = run.kmeans(x, 8, start)
        assert bool((centres.diff(dim=1) >= 0).all())
        if start == "partition":
            is_fixed_point(x, centres)
        one = x.mean(1, keepdim=True)
        assert bool((squared_error(x, centres) < squared_error(x, one)).all())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    n=st.integers(1, 200),
    k=st.sampled_from([1, 2, 3, 4, 8, 16, 64]),
    start=st.sampled_from(STARTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    seed=st.integers(0, 99),
    weighted=st.sampled_from([None, "all", "each"]),
)
def test_the_cpp_and_torch_twins_give_equal_bits(
    shape: str, n: int, k: int, start: str, dtype: torch.dtype, seed: int, weighted: str | None
) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(str(library("kmeans_columns")))
    x = columns(shape, n, seed, dtype=dtype)
    cpp, twin = (kernel("kmeans_columns", b).run for b in ("cpu", "torch"))
    weights = None
    if weighted is not None:
        # A fifth of them nothing.
        weights = columns("uniform", n, seed, 1 if weighted == "all" else len(x)).sub(0.2).clamp(min=0)
        weights = weights[0] if weighted == "all" else weights
    centres = cpp.kmeans(x, k, start, weights)
    assert torch.equal(centres, twin.kmeans(x, k, start, weights))
    assert centres.dtype is dtype
    assert torch.equal(cpp.nearest(x, centres), twin.nearest(x, centres))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 8])
def test_weighted_centres_are_close_to_the_exact_optimum(backend: str, k: int) -> None:
    """Weights over three powers of ten, as diagonals of Hessians."""
    run = kernel("kmeans_columns", backend).run
    for shape in ("normal", "heavy", "two"):
        x = columns(shape, 300, seed=k)
        w = 10 ** torch.from_numpy(np.random.RandomState(k).uniform(-1.5, 1.5, (4, 300)))
        centres = run.kmeans(x, k, "partition", w).double()
        found = (w * (x.double()[:, :, None] - centres[:, None, :]).square().amin(2)).sum(1)
        assert bool((found < (w * (x.double()[:, :, None] - run.kmeans(x, k).double()[:, None, :]).square().amin(2)).sum(1)).all())
        for column, own, error in zip(x, w, found, strict=True):
            # Candidate cuts do not know of weights: some percent above the optimum, which weights shift.
            assert exact(column, k, own) * (1 - 1e-6) <= float(error) <= 1.06 * exact(column, k, own)
    with pytest.raises(ValueError, match=r"weights have shape \(7,\); give \(4, 300\), or \(300,\) for all"):
        run.kmeans(x, k, "partition", torch.ones(7))


@pytest.mark.parametrize("start", STARTS)
def test_weights_of_two_change_nothing_and_whole_ones_are_repetitions(start: str) -> None:
    """Twice every sum is exact, so that all comparisons come out the same."""
    x = columns("normal", 200, dtype=torch.float64)
    for backend in BACKENDS:
        run = kernel("kmeans_columns", backend).run
        assert torch.equal(run.kmeans(x, 8, start, torch.full((200,), 2.0)), run.kmeans(x, 8, start))
        times = torch.arange(200) % 4
        many = x[:1].repeat_interleave(times, dim=1)
        centres = run.kmeans(x[:1], 8, "partition", times)
        # A fixed point of repeated values: each centre is the mean of those nearest to it.
        is_fixed_point(many, centres)
    plain = kernel("kmeans_columns", "reference").run
    w = torch.rand(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for backend in BACKENDS:
        # Sums in another order: 200 additions in float64.
        made = kernel("kmeans_columns", backend).run.kmeans(x, 4, "plus_plus", w)
        torch.testing.assert_close(made, plain.kmeans(x, 4, "plus_plus", w), rtol=1e-9, atol=1e-9)
    assert torch.equal(plain.kmeans(x, 4, "plus_plus", w / 1024), plain.kmeans(x, 4, "plus_plus", w))


def test_the_twins_agree_where_values_crowd_in_a_small_part_of_the_range() -> None:
    """Which the C++ sorts another way than values that spread over it; and zeros of both signs, denormals and a range beyond float32."""
    if "cpu" not in BACKENDS:
        pytest.skip(str(library("kmeans_columns")))
    cpp, twin = (kernel("kmeans_columns", b).run for b in ("cpu", "torch"))
    x = columns("normal", 2000, count=6)
    x[1, 0], x[2] = 1e9, (8 * x[2]).exp()
    x[3, ::2], x[3, ::3] = 0.0, -0.0
    x[4] *= 1e-41
    x[5, :2] = torch.tensor([3e38, -3e38])
    for start in STARTS:
        assert torch.equal(cpp.kmeans(x, 8, start), twin.kmeans(x, 8, start))
    few = torch.tensor([0.0, -0.0, 1.0]).repeat(30)[None]
    assert cpp.kmeans(few, 2).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_plus_plus_equals_the_plain_loop(backend: str) -> None:
    run, plain = kernel("kmeans_columns", backend).run, kernel("kmeans_columns", "reference").run
    for shape in SHAPES:
        if shape == "rounded":
            continue  # values halfway between two centres go where the last bit of a mean says
        x = columns(shape, 400, dtype=torch.float64)
        for k in (2, 4, 8, 16):
            # Sums in another order: 400 additions of numbers up to 1e4 in float64.
            torch.testing.assert_close(run.kmeans(x, k, "plus_plus"), plain.kmeans(x, k), rtol=1e-9, atol=1e-9)


def test_the_random_numbers_are_those_of_numpy() -> None:
    for k in (1, 2, 4, 16, 256):
        assert draws(k) == tuple(np.random.RandomState(10).random_sample(1 + (k - 1) * trials(k)))
    assert draws(3, seed=0) == tuple(np.random.RandomState(0).random_sample(7))


def test_threads_have_one_tensor_of_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are given its address: it may not be freed, though several threads made one."""
    monkeypatch.setattr(kmeans_columns, "_DRAWS", {})
    both = Barrier(2, timeout=30)

    def drawn(k: int) -> tuple[float, ...]:
        both.wait()  # so both have found none
        return draws(k)

    monkeypatch.setattr(kmeans_columns, "draws", drawn)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda k: draws_on(k, torch.device("cpu")), (4, 4))
    assert one is other is draws_on(4, torch.device("cpu"))
    assert one.tolist() == list(draws(4))


def test_a_partition_beats_plus_plus_on_the_average() -> None:
    run = kernel("kmeans_columns").run
    for shape in SHAPES:
        x = columns(shape, 512, count=30)
        ratio = squared_error(x, run.kmeans(x, 16, "partition")) / squared_error(x, run.kmeans(x, 16, "plus_plus")).clamp(min=1e-300)
        assert float(ratio.mean()) < 1


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("k", [4, 16, 64])
def test_few_values_are_kept_exactly(backend: str, k: int) -> None:
    run = kernel("kmeans_columns", backend).run
    start = "plus_plus" if backend == "reference" else "partition"
    values = torch.tensor([-3.5, 0.1, 0.7, 2.0])
    for few in (1, 3, 4):
        x = values[torch.randint(few, (2, 50), generator=torch.Generator().manual_seed(few))]
        x[:, :few] = values[:few]
        centres = run.kmeans(x, k, start)
        assert torch.equal(centres, torch.cat([values[:few], values[few - 1].expand(k - few)]).expand(2, k))
        assert torch.equal(centres.gather(1, run.nearest(x, centres).long()), x)
        assert torch.equal(run.kmeans(x, k, start, (x < 0.5).float()), centres)  # also those that weigh nothing


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_centre_that_weighs_nothing_stays_where_it_was_drawn(backend: str) -> None:
    """The first at the one value that weighs anything, or at the last where none does; as nothing is left, the other at the first."""
    x = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    for weights, first in zip((*torch.eye(4), torch.zeros(4)), (3.0, 1.0, 2.0, 5.0, 5.0), strict=True):
        centres = kernel("kmeans_columns", backend).run.kmeans(x, 2, "plus_plus", weights)
        assert centres.tolist() == [sorted((first, 3.0))]


def test_the_plain_loop_computes_in_float64() -> None:
    """Squares of these values are no float16 numbers, nor are the distances to most centres."""
    run, x = kernel("kmeans_columns", "reference").run, 1000 * columns("normal", 100, dtype=torch.float16)
    centres = run.kmeans(x.double(), 8)
    assert torch.equal(run.kmeans(x, 8), centres.half())
    assert torch.equal(run.nearest(x, centres.half()), run.nearest(x.double(), centres.half().double()))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_codes_are_the_nearest_centre_and_the_lower_one_halfway(backend: str) -> None:
    run = kernel("kmeans_columns", backend).run
    centres = torch.tensor([[-1.0, 0.0, 2.0, 4.0]])
    assert run.nearest(torch.tensor([[-9.0, -0.5, -0.4, 1.0, 1.1, 7.0]]), centres).tolist() == [[0, 0, 1, 1, 2, 3]]
    x = columns("heavy", 333)
    for k in (16, 64):
        found = kernel("kmeans_columns").run.kmeans(x, k)
        codes = run.nearest(x, found)
        assert codes.dtype is torch.uint8
        near = (x.double() - found.double().gather(1, codes.long())).abs()
        # Middles are rounded to float32: 2^-24 of the larger centre.
        assert bool((near <= (x.double()[:, :, None] - found.double()[:, None, :]).abs().amin(2) + 1e-6 * x.abs().amax()).all())


def test_each_column_is_fitted_on_its_own() -> None:
    x = torch.cat([columns(shape, 200) for shape in SHAPES])
    for backend in BACKENDS:
        run = kernel("kmeans_columns", backend).run
        for start in STARTS:
            together = run.kmeans(x, 8, start)
            assert all(torch.equal(run.kmeans(row[None], 8, start)[0], centres) for row, centres in zip(x, together, strict=True))


def test_the_table_names_backends_and_refuses_others() -> None:
    assert list(TABLE["kmeans_columns"]) == ["cuda", "cpu", "torch", "reference"]
    assert kernel("kmeans_columns", "reference").backend == "reference"
    assert kernel("kmeans_columns", device="meta").backend == "torch"
    with pytest.raises(ValueError, match=r"backend 'triton' of kmeans_columns is unknown; choose one of auto, cuda, cpu, torch, reference"):
        kernel("kmeans_columns", "triton")
    with pytest.raises(ValueError, match=r"kernel 'kmeens' is unknown; choose one of .*kmeans_columns"):
        kernel("kmeens")
    with pytest.raises(RuntimeError, match=r"backend cpu of kmeans_columns does not work on meta: .* works on CPU tensors"):
        kernel("kmeans_columns", "cpu", "meta")
    for backend in (*BACKENDS, "reference"):
        run = kernel("kmeans_columns", backend).run
        with pytest.raises(ValueError, match="start='best' is unknown; choose partition or plus_plus"):
            run.kmeans(columns("normal", 9), 2, "best")
        with pytest.raises(ValueError, match="k=257 centres; give 1 to 256"):
            run.kmeans(columns("normal", 9), 257)
    with pytest.raises(ValueError, match="the reference starts by plus_plus only"):
        kernel("kmeans_columns", "reference").run.kmeans(columns("normal", 9), 2, "partition")
