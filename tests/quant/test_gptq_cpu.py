"""The twin of the GPTQ block loop in C++: the bits of the plain loop that takes errors off by one operation, rounded once, in each of its
forms; and how far that is from the reference, which rounds products first."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from quant.affine import Affine, ZeroKind
from quant.grids import GRIDS
from quant.kernels import kernel, native
from quant.kernels.gptq_block import cpu
from tests.quant.plain_loop import less, plain_loop, poisoned, same
from tests.quant.test_gptq_block import FOUND, STACKS, problem, ranges_are_found, rows_need_no_others, with_odd_numbers

FORMS = {"lanes": cpu.LANES, "avx2": cpu.AVX2, "avx512": cpu.AVX512}
DTYPES = [torch.float32, torch.float64]
REFERENCE = kernel("gptq_block", "reference").run.solve_block


@pytest.fixture(autouse=True)
def _works() -> None:
    reason = native.unavailable("gptq_block", torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> int:
    asked = FORMS[request.param]
    if asked != cpu.LANES and asked not in cpu.forms():
        pytest.skip(f"this processor has no {request.param}")
    return asked


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_is_rounded_once(dtype: torch.dtype) -> None:
    """Against whole numbers of any size. Where x is next to e · u, and where their sum is next to the middle of two floats, too."""
    g, digits = torch.Generator().manual_seed(5), 23 if dtype is torch.float32 else 52
    ulp, many = 2.0**-digits, 3000
    e, u = (1 + ulp * torch.randint(-(2**digits), 2**digits, (2, many), generator=g).to(dtype)).unbind()
    x = torch.randn(many, generator=g, dtype=dtype) * 2.0 ** torch.randint(-30, 30, (many,), generator=g)
    x[:1000] = (e * u)[:1000]
    x[1000:2000] = (1 + ulp * torch.randint(0, 4, (1000,), generator=g)) * 2.0 ** torch.randint(digits, digits + 4, (1000,), generator=g)
    got = less(x, e, u)
    once = [Fraction(a) - Fraction(b) * Fraction(c) for a, b, c in zip(x.tolist(), e.tolist(), u.tolist(), strict=True)]
    lasts = (got.view(torch.int32 if dtype is torch.float32 else torch.int64) & 1).tolist()
    # No float lies nearer; ties are decided by the last bit.
    for near in (torch.nextafter(got, torch.full_like(got, torch.inf)), torch.nextafter(got, torch.full_like(got, -torch.inf))):
        for mine, other, exact, last in zip(got.tolist(), near.tolist(), once, lasts, strict=True):
            off, beside = abs(Fraction(mine) - exact), abs(Fraction(other) - exact)
            assert off < beside or (off == beside and not last)
    assert not torch.equal(got, x - e * u)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_each_form_equals_the_plain_loop(form: int, grid: str, dtype: torch.dtype) -> None:
    """Rows that fill stripes of a form, and others; whole panels, and others; one column."""
    for rows, columns, bits in ((1, 16, 2), (31, 48, 3), (32, 128, 4), (73, 32, 5), (48, 16, 8)):
        if dtype is torch.float64 and rows * columns**2 > 50000:
            continue  # number by number
        w, upper, affine, group = problem(rows, columns, grid, bits, dtype)
        for some in (columns, columns - 3, 1):
            given = w[:some], upper[:some, :some], affine, group[:some]
            same(cpu.solve_block(*given, poisoned(w[:some]), form=form), plain_loop(*given))


@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_codes_are_those_of_products_rounded_first(grid: str) -> None:
    """All but one of a thousand at most, as asked for; and not all bits, else this would not be about the fused operation."""
    apart = total = 0
    for bits in (2, 3, 4, 8):
        given = problem(256, 128, grid, bits, torch.float32)
        want, got = REFERENCE(*given), cpu.solve_block(*given)
        apart, total = apart + int((got.codes != want.codes).sum()), total + got.codes.numel()
        assert not torch.equal(got.errors, want.errors)
    assert apart <= 1e-3 * total


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_nothing_is_taken_off_all_bits_are_the_references(grid: str, dtype: torch.dtype) -> None:
    w, upper, affine, group = problem(70, 64, grid, 4, dtype)
    diagonal = upper.diagonal().diag()
    same(cpu.solve_block(w, diagonal, affine, group), REFERENCE(w, diagonal, affine, group))


@pytest.mark.parametrize("kind", list(ZeroKind))
def test_numbers_of_any_size(form: int, kind: ZeroKind) -> None:
    w, upper, affine, group = with_odd_numbers(kind)
    for factor in (1.0, 1e-35, 1e35, torch.nan, 0.0):
        given = w, upper * factor, affine, group
        same(cpu.solve_block(*given, form=form), plain_loop(*given))
    far = Affine(affine.scale, affine.zero + 3e6, 8, kind, affine.tops)
    same(cpu.solve_block(w, upper, far, group, form=form), plain_loop(w, upper, far, group))


@pytest.mark.usefixtures("_threads")
def test_threads_share_rows_and_nothing_else(form: int) -> None:
    w, upper, affine, group = problem(1000, 32, "g_asym", 4, torch.float32)
    want = plain_loop(w, upper, affine, group)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        same(cpu.solve_block(w, upper, affine, group, form=form), want)


@pytest.mark.parametrize(("grid", "widths"), STACKS)
def test_stacked_configurations_are_solved_as_apart(form: int, grid: str, widths: tuple[int, ...]) -> None:
    rows_need_no_others(lambda *given: cpu.solve_block(*given, form=form), grid, widths)


@pytest.mark.parametrize("grids", FOUND, ids=lambda grids: grids[-1])
def test_ranges_are_found_in_the_launch(form: int, grids: tuple[str, ...]) -> None:
    ranges_are_found(lambda *given: cpu.solve_block(*given, form=form), grids)


def test_without_the_operation_torch_solves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "forms", lambda: ())
    chosen = kernel("gptq_block")
    assert chosen.backend == "torch"
    assert "no fused multiply-add" in " ".join(chosen.notes)
    w, upper, affine, group = problem(4, 16, "g_asym", 4, torch.float32)
    with pytest.raises(ValueError, match="form 2 does not work here; choose one of 0, 1"):
        cpu.solve_block(w, upper, affine, group, form=cpu.AVX2)


X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        pytest.param([], not X86, id="any"),
        pytest.param(["-mfma"], True, id="fma", marks=pytest.mark.skipif(not X86, reason="a flag of x86")),
    ],
)
def test_a_library_for_one_kind_of_processor(flags: list[str], chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler that makes no functions for other processors leaves: one form, whose bits are the same; nothing for any x86."""
    compiler = next(filter(None, map(shutil.which, native.COMPILERS)))
    made = tmp_path / "plain.so"
    subprocess.run([compiler, *native.FLAGS, "-DBITGRID_PLAIN", *flags, native.SOURCES / "gptq_block.cpp", "-o", made], check=True)
    library, forms = ctypes.CDLL(str(made)), ctypes.c_int64(-1)
    library.bitgrid_gptq_block_forms(ctypes.byref(forms))
    assert forms.value == (chosen << cpu.LANES)
    if not cpu.forms():  # found out, and kept, with the library as it is
        pytest.skip("this processor does not run it")
    monkeypatch.setattr(native, "library", lambda name: library)
    given = problem(37, 48, "g_asym", 4, torch.float32)
    same(cpu.solve_block(*given), plain_loop(*given))
