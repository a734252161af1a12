"""Groups rounded and packed in one pass: twins against the grids, bit for bit. Triton's in its interpreter, or on a GPU if there is one.

A result of the reference is that of `fit`, `Affine.encode` and `pack_bits`; these are tested where they are defined.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.errors import NonFiniteError
from quant.grids import GRIDS, fit_unchecked, unfit_float16
from quant.kernels import kernel, on_triton
from quant.kernels.rtn_pack import Packed, cpu, reference, shape_of
from quant.methods.rtn import Rtn
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from quant.tensors.packing import pack_bits, unpack_bits

HALF, WHOLE = torch.float16, torch.float32
GPU = torch.device("cuda") if torch.cuda.is_available() else None
# Of scales that float16 rounds to 0, whose codes mean nothing, the interpreter divides all the same.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def triton_device() -> torch.device:
    if GPU is None:
        pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    place = GPU or torch.device("cpu")
    reason = on_triton.unavailable(place)
    if reason is not None:
        pytest.skip(reason)
    return place


@pytest.fixture
def cpp() -> None:
    """Builds the library when a test runs, not when tests are collected."""
    if kernel("rtn_pack").backend != "cpu":
        pytest.skip("there is no C++ library")


in_cpp = pytest.mark.usefixtures("cpp")


def places() -> list[tuple[str, torch.device]]:
    """Every backend that works, and where."""
    cpu = [("cpu", torch.device("cpu"))] if kernel("rtn_pack").backend == "cpu" else []
    return [*cpu, ("triton", triton_device()), ("reference", triton_device())]


def weight(rows: int, width: int, seed: int = 0) -> Tensor:
    """`[rows, 4 width]`: ordinary groups, and in the first rows groups without a range, of one sign, of the least and greatest values that
    float16 scales belong to, and of halves of a step."""
    w = torch.randn(rows, 4 * width, generator=torch.Generator().manual_seed(seed))
    w[0, :width], w[0, width : 2 * width], w[0, 2 * width : 3 * width] = 0, 1, -0.5
    w[1] = w[1].abs()
    w[2] = -w[2].abs()
    w[3, :width] *= 1e-7
    w[3, width : 2 * width] *= 1e4
    halves = torch.arange(4 * width) % 16 - 7.5
    w[4] = halves
    w[4, ::16] = -8
    return w


def same(got: Packed, want: Packed, bits: int) -> None:
    assert torch.equal(got.told.cpu(), want.told)
    for name in ("scale", "zero", "codes", "stream"):
        ours, plain = getattr(got, name), getattr(want, name)
        assert ours.dtype is plain.dtype
        assert ours.is_contiguous()
        assert torch.equal(ours.cpu(), plain), name
    assert torch.equal(unpack_bits(got.stream, bits, got.codes.numel()).view(got.codes.shape), got.codes)


def agree(w: Tensor, grid: str, bits: int, width: int, dtype: torch.dtype) -> None:
    for backend, place in places():
        if backend != "reference":
            agrees(w, grid, bits, width, dtype, backend, place)


def agrees(w: Tensor, grid: str, bits: int, width: int, dtype: torch.dtype, backend: str, place: torch.device, mse: bool = False) -> None:
    run = partial(kernel("rtn_pack", backend, place).run.rtn_pack, mse=mse)
    want = reference.rtn_pack(w, grid, bits, width, dtype, mse=mse)
    if int(want.told[1]):
        # Codes of scales that do not fit mean nothing: they are counted, and the other groups compared.
        got = run(w.to(place), grid, bits, width, dtype)
        assert torch.equal(got.told.cpu(), want.told)
        groups = w.reshape(-1, width)
        w = groups[~unfit_float16(fit_unchecked(GRIDS[grid], groups.float(), bits, dtype, mse), groups.float())[:, 0]]
        want = reference.rtn_pack(w, grid, bits, width, dtype, mse=mse)
        assert not want.told.any()
    same(run(w.to(place), grid, bits, width, dtype), want, bits)


@quiet
@pytest.mark.parametrize(("bits", "dtype", "scales"), [(4, torch.bfloat16, HALF), (3, torch.float32, HALF), (8, torch.float16, WHOLE)])
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_every_grid(grid: str, bits: int, dtype: torch.dtype, scales: torch.dtype) -> None:
    agree(weight(7, 32).to(dtype), grid, bits, 32, scales)


@in_cpp
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_the_range_of_least_error(grid: str) -> None:
    """By the C++ search, groups too close to call by torch's: the reference's choice of ranges in all of them."""
    agrees(weight(7, 32), grid, 3, 32, HALF, "cpu", torch.device("cpu"), mse=True)
    agrees(torch.randn(6, 43, generator=torch.Generator().manual_seed(2)), grid, 4, 43, WHOLE, "cpu", torch.device("cpu"), mse=True)


@in_cpp
def test_few_groups_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Tensor] = []
    settle = cpu._settle
    monkeypatch.setattr(cpu, "_settle", lambda *given: (told.append(given[-1] & cpu.CLOSE), settle(*given)))
    w = torch.randn(8, 1024, generator=torch.Generator().manual_seed(3))
    agrees(w, "g_asym", 3, 64, HALF, "cpu", torch.device("cpu"), mse=True)
    # An error of 64 sums is off by 2e-5 of itself at most; ranges are 1 % apart.
    assert int((told[0] > 0).sum()) <= 0.1 * told[0].numel()


@quiet
@pytest.mark.parametrize("k", [24, 43])
def test_errors_of_groups(k: int) -> None:
    """Against the stored tensor's values in float64. Values are off by 2^-24 of 16 steps, errors by as much."""
    w = weight(6, k)
    w[3] = 1
    for (backend, at), (grid, kind) in itertools.product(places(), (("omni", "integer"), ("hqq", "float"), ("kivi", "minimum"))):
        made = kernel("rtn_pack", backend, at).run.rtn_pack(w.to(at), grid, 4, k, WHOLE, error=True)
        values = AffineTensor(made.codes.cpu(), made.scale.cpu(), made.zero.cpu(), 4, ZeroKind(kind)).dequantize().double()
        off = (values - w).view(*made.scale.shape, k)
        unit = 2.0**-20 * w.abs().amax()
        assert ((made.error.cpu() - off.square().sum(-1)).abs() <= k * unit * (2 * off.abs().amax(-1) + unit)).all()


@quiet
@pytest.mark.parametrize(("width", "bits"), [(128, 2), (64, 5), (96, 6), (24, 4), (43, 7), (1, 2), (256, 4)])
def test_every_width(width: int, bits: int) -> None:
    agree(weight(5, width, bits).bfloat16(), "g_asym", bits, width, HALF)


@quiet
@pytest.mark.parametrize(("width", "bits"), [(640, 4), (4160, 3), (515, 4)])
def test_groups_that_are_read_twice(width: int, bits: int) -> None:
    agree(torch.randn(2, width, generator=torch.Generator().manual_seed(width)).bfloat16(), "g_asym", bits, width, HALF)


@quiet
def test_more_groups_than_one_program_has() -> None:
    agree(torch.randn(150, 64, generator=torch.Generator().manual_seed(1)).bfloat16(), "g_sym", 4, 32, HALF)


def test_only_what_is_wanted_is_made() -> None:
    w = weight(5, 32).bfloat16()
    for backend, place in places():
        run = kernel("rtn_pack", backend, place).run
        both = run.rtn_pack(w.to(place), "q_sym", 4, 32, WHOLE)
        stream, codes = (run.rtn_pack(w.to(place), "q_sym", 4, 32, WHOLE, codes=c, stream=not c) for c in (False, True))
        assert (stream.codes, codes.stream) == (None, None)
        assert torch.equal(stream.stream, both.stream)
        assert torch.equal(codes.codes, both.codes)


@quiet
def test_numbers_that_are_none_are_told() -> None:
    w = torch.ones(3, 64)
    w[1, 5], w[2, 40] = torch.nan, -torch.inf
    for backend, place in places():
        assert int(kernel("rtn_pack", backend, place).run.rtn_pack(w.to(place), "q_sym", 4, 32, WHOLE).told[0]) == 2
    with pytest.raises(NonFiniteError, match="2 NaN or infinite values"):
        Rtn().quantize(w, Statistics(), WeightScheme(4, granularity=Granularity.GROUP, group_size=32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_step_after_the_inverse_rounds_like_a_division(bits: int) -> None:
    """Every pair of 11-bit numbers whose quotient's magnitude is up to 2^bits, by powers of 2 between them. float64 holds the fused
    products exactly: 24 + 11 bits, less than 53."""
    a = (1024 + torch.arange(1024)).float()[:, None]
    s = (1024 + torch.arange(1024)).float()[None, :]
    inverse = torch.ones(()) / s
    for power in range(-2, bits + 1):
        v = a * 2.0**power
        near = v * inverse
        rest = (v.double() - near.double() * s.double()).float()
        q = (rest.double() * inverse.double() + near.double()).float()
        assert torch.equal((q + 12582912.0) - 12582912.0, (v / s).round())


def test_the_method_stores_what_the_kernel_packed() -> None:
    w = weight(6, 32)
    w[3] = 1  # whose ranges float16 holds
    for scheme in (WeightScheme(4), WeightScheme(3, True, Granularity.GROUP, 32), WeightScheme(5, granularity=Granularity.TENSOR)):
        tensor = Rtn().quantize(w, Statistics(), scheme).tensor
        assert isinstance(tensor, AffineTensor)
        assert torch.equal(tensor.pack()["codes"], pack_bits(tensor.codes, scheme.bits))
        scaled = tensor.with_input_scale(torch.full((w.shape[1],), 2.0))
        assert torch.equal(scaled.pack()["codes"], pack_bits(tensor.codes, scheme.bits))
        affine = Affine(tensor.columns(tensor.scale), tensor.columns(tensor.zero), scheme.bits, tensor.kind)
        assert torch.equal(affine.encode(w).to(torch.uint8), tensor.codes)


def test_widths_that_do_not_fit_are_refused() -> None:
    assert shape_of(torch.ones(3, 8), 24) == (1, 1)
    with pytest.raises(ValueError, match=r"groups of 3 do not fit a weight of shape \(3, 8\)"):
        shape_of(torch.ones(3, 8), 3)


@pytest.mark.gpu("triton")
@pytest.mark.parametrize(("n", "k"), [(1024, 4096), (517, 11008)])
def test_real_shapes_on_a_gpu(n: int, k: int) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(k)) / 50
    for dtype, (grid, bits), width in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32),
        (("g_asym", 4), ("g_sym", 3), ("awq_asym", 2), ("omni", 8), ("hqq", 4)),
        (128, 32, k),
    ):
        agree(w.to(dtype), grid, bits, width, HALF)


@pytest.mark.gpu
def test_the_reference_is_the_same_on_a_gpu() -> None:
    w = weight(64, 128).bfloat16()
    for grid in GRIDS:
        ours, plain = (reference.rtn_pack(w.to(place), grid, 4, 128, WHOLE) for place in (GPU or "cpu", "cpu"))
        same(ours, plain, 4)
