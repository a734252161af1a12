"""`lazy_update`: later weights less a product over the columns of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.lazy_update import halves, triton
from quant.kernels.lazy_update.triton import LEAST_WIDE, ROOMY, TILE, WIDE, Tile, tile_for
from quant.kernels.on_triton import unavailable
from quant.methods.gptq import Gptq
from quant.scheme import Granularity, WeightScheme
from quant.solver import solve_columns
from quant.statistics import Statistics

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(unavailable(CPU) is not None, reason=str(unavailable(CPU)))
PLACES = ["torch", *(pytest.param(form, marks=INTERPRETED) for form in ("triton", "halves"))]
GPU = pytest.mark.gpu("triton")
UNIT = 2.0**-24
HALVES = Tile(32, 32, 16, 4, 1, halves=True)
Update = Callable[..., None]


def update(backend: str) -> Update:
    run = partial(triton.lazy_update, tile=HALVES) if backend == "halves" else kernel("lazy_update", backend).run.lazy_update
    return run


def given(r: int, n: int, b: int, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Left as the solver has it, rows of a factor; numbers of many sizes, so that each part of a sum is felt."""
    g = torch.Generator().manual_seed(r + n + b)
    later, factor, right = (torch.randn(s, generator=g) * 2.0 ** torch.randint(-6, 7, s, generator=g) for s in ((r, n), (b, r), (b, n)))
    return later.to(device), factor.to(device).T, right.to(device)


def check(run: Update, later: Tensor, left: Tensor, right: Tensor) -> None:
    want, size = later.double() - left.double() @ right.double(), left.double().abs() @ right.double().abs()
    run(later, left, right)
    # Products are off by 3 u at most (of two parts of TF32 each, the smallest product left out; 8 u of two of float16), sums of B by B
    # u more, and the last by one.
    bound = (left.shape[1] + 8) * UNIT * size + UNIT * want.abs()
    assert ((later.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize(("r", "n", "b"), [(1, 1, 1), (33, 40, 16), (64, 31, 20), (5, 70, 128)])
def test_it_takes_a_product_off(backend: str, r: int, n: int, b: int) -> None:
    check(update(backend), *given(r, n, b))


@pytest.mark.parametrize("backend", PLACES[:2])
def test_many_columns_may_be_taken_off_by_so_many(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By halves too, whose programs hold no more at once."""
    monkeypatch.setattr(triton, "tile_for", lambda r, n, b, device: HALVES)
    check(update(backend), *given(9, 40, halves.MOST + 30))


@pytest.mark.parametrize("backend", PLACES)
def test_strided_parts_of_larger_tensors(backend: str) -> None:
    """As the solver has them: rows of the weights, rows of the factor right of its block; what lies beside them stays as it is."""
    run = update(backend)
    later, left, right = given(40, 36, 24)
    around, factor = torch.full((50, 48), torch.nan), torch.full((24, 60), torch.nan)
    around[10:, :36], factor[:, 20:] = later, left.T
    run(around[10:, :36], factor[:, 20:].T, right)
    run(later, left, right)
    assert torch.equal(around[10:, :36], later)
    assert around[:10].isnan().all()
    assert around[:, 36:].isnan().all()


@pytest.mark.parametrize("backend", PLACES)
def test_parts_have_what_they_have_alone(backend: str) -> None:
    """Of widths that begin with tiles: the interpreter multiplies a tile by NumPy, where a column's bits may go by its place."""
    run, sizes = update(backend), [32, 64, 8]
    later, left, right = given(20, sum(sizes), 32)
    alone = [t.clone() for t in torch.split(later, sizes, dim=1)]
    for part, own in zip(alone, torch.split(right, sizes, dim=1), strict=True):
        run(part, left, own.contiguous())
    run(later, left, right, sizes)
    assert torch.equal(later, torch.cat(alone, dim=1))


def test_float64_is_torchs() -> None:
    later = torch.zeros(2, 3, dtype=torch.float64)
    assert kernel("lazy_update", device="cpu", later=later).backend == "torch"
    if unavailable(CPU) is None:
        assert "float64" in str(triton.refuses(later))
        with pytest.raises(ValueError, match="float64"):
            triton.lazy_update(later, torch.zeros(2, 1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))


def check_halves(run: Update, device: torch.device) -> None:
    """Taken once, a number comes out as it went in, but for its last bit, and small ones to within 2^-39 of the largest of their column."""
    whole = given(1, 40, 48)[2]
    whole[:, :4] *= 2.0**90
    whole[:, 4:8] *= 2.0**-90
    whole[1:, 8:12] *= 2.0**-24
    whole[:, 12] = 0
    largest = whole.abs().amax(0).double()
    for left, right in ((torch.eye(48), whole), (whole.T, torch.eye(48))):
        later = torch.zeros(len(left), right.shape[1], device=device)
        run(later, left.to(device), right.to(device))
        got, want = (t if right is whole else t.T for t in (-later.cpu().double(), left.double() @ right.double()))
        assert ((got - want).abs() <= 2 * UNIT * want.abs() + 2.0**-39 * largest).all()
        assert (got == want).double().mean() > 0.6, "one in four has a last bit that is lost, and one in twelve is small"


@INTERPRETED
def test_two_halves_are_nearly_the_number() -> None:
    check_halves(update("halves"), CPU)


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(backend: str, number: float) -> None:
    later, left, right = given(20, 24, 16)
    right[3, 5] = number
    left[7, 2] = number
    update(backend)(later, left, right)
    wanted = torch.ones(20, 24, dtype=torch.bool)
    wanted[:, 5] = wanted[7] = False
    assert torch.equal(later.isfinite(), wanted)


@INTERPRETED
def test_by_halves_a_product_is_over_few_columns() -> None:
    with pytest.raises(ValueError, match="at most 1024 columns, not 1025"):
        update("halves")(*given(4, 4, halves.MOST + 1))


def test_many_columns_are_taken_at_once_where_a_gpu_is_fast_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel("lazy_update", "torch").run.reach(96, CPU) == triton.reach(96, CPU) == 96
    monkeypatch.setattr(triton, "has_wide", lambda device: True)
    assert [triton.reach(block, CPU) for block in (128, 96, 1000)] == [512, 480, 1000]


def test_what_is_taken_off_at_once_is_what_blocks_take_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven blocks, two at a time; in float64, so that no code is at stake."""
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(16, 112, generator=g, dtype=torch.float64), torch.randn(300, 112, generator=g, dtype=torch.float64)
    statistics, scheme = Statistics(hessian=x.T @ x), WeightScheme(4, granularity=Granularity.GROUP, group_size=16)
    method, run = Gptq(block_size=16), kernel("lazy_update", "torch").run
    want = method.quantize(weight, statistics, scheme).tensor.pack()
    update, shapes = run.lazy_update, list[tuple[int, ...]]()
    monkeypatch.setattr(run, "lazy_update", lambda later, left, *more: (shapes.append(tuple(left.shape)), update(later, left, *more)))
    monkeypatch.setattr(run, "reach", lambda block, device: 2 * block)
    got = method.quantize(weight, statistics, scheme).tensor.pack()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert shapes == [(16, 16), (80, 32), (16, 16), (48, 32), (16, 16), (16, 32)]


def test_forms_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    for capability, even in (((9, 0), TILE), ((8, 0), ROOMY)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert [tile_for(r, n, 128, CPU) for r, n in ((32, 48), (31, 48), (32, 40))] == [even, ROOMY, ROOMY]
    monkeypatch.setattr(triton, "has_wide", lambda device: True)
    assert [tile_for(32, 48, b, CPU) for b in (128, LEAST_WIDE, halves.MOST)] == [ROOMY, WIDE, WIDE]


def _forms() -> Sequence[Tile | None]:
    forms: list[Tile | None] = [None, Tile(64, 64, 32, 4, 2, halves=True)]
    if torch.cuda.is_available() and triton.has_wide(torch.device("cuda")):
        forms += [WIDE]
    return forms


@GPU
def test_solvers_say_that_later_blocks_are_updated_by_torch() -> None:
    w, upper = torch.ones(4, 3, dtype=torch.float64, device="cuda"), torch.eye(4, dtype=torch.float64, device="cuda")
    solved = solve_columns(w, upper, 2, lambda _j, column, _w: (column, column))
    assert solved.notes == ["lazy_update runs slower: the Triton program takes float32, not torch.float64"]
    assert not solve_columns(w.float(), upper.float(), 2, lambda _j, column, _w: (column, column)).notes


@GPU
@pytest.mark.parametrize("tile", _forms())
@pytest.mark.parametrize(("r", "n", "b"), [(130, 4096, 128), (1000, 300, 128), (7, 5, 44), (2048, 512, 128), (900, 1000, 512)])
def test_on_a_gpu(r: int, n: int, b: int, tile: Tile | None) -> None:
    run = partial(triton.lazy_update, tile=tile)
    later, left, right = given(r, n, b, torch.device("cuda"))
    check(run, later.clone(), left, right)
    alone = later[:, : n // 2].clone()
    run(alone, left, right[:, : n // 2])
    run(later, left, right)
    assert torch.equal(later[:, : n // 2], alone)


@GPU
@pytest.mark.parametrize("tile", [t for t in _forms() if t and t.halves])
def test_two_halves_are_nearly_the_number_on_a_gpu(tile: Tile) -> None:
    check_halves(partial(triton.lazy_update, tile=tile), torch.device("cuda"))
