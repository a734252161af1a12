"""Products of rounded activations and integer weights, as sums of integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.affine import ZeroKind
from quant.grids import GRIDS, fit
from quant.kernels import TABLE, kernel, unavailable
from quant.kernels.fake_quantize import reference as rows
from quant.kernels.int8_linear import MOST_COLUMNS, eager, prepare
from quant.scheme import ActivationScheme, Granularity
from quant.tensors.affine import AffineTensor

BACKENDS = [b for b in TABLE["int8_linear"] if unavailable("int8_linear", b) is None]


def weight(n: int, k: int, bits: int, grid: str = "g_asym", per_tensor: bool = False) -> AffineTensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) + 0.3
    ranged = w.reshape(1, -1) if per_tensor else w
    affine = fit(GRIDS[grid], ranged, bits, torch.float16)
    codes = affine.encode(ranged).view(n, k)
    return AffineTensor.build(codes, affine, torch.float16)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) + 1
    return (x * torch.logspace(-3, 3, m)[:, None]).to(dtype)


def simulated(x: Tensor, tensor: AffineTensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """The product of an evaluation, in float64, and the magnitudes of what is added up, zeros apart: what roundings are relative to."""
    rounded = rows.fake_quantize(x.float(), scheme.bits, scheme.symmetric, scheme.clip).double()
    made = tensor.dequantize().double()
    packed = prepare(tensor, scheme)
    coded = rows.encode(x, scheme.bits, scheme.symmetric, scheme.clip)
    a, za = coded.codes.double().abs(), coded.zero.double().abs()
    zc = torch.zeros(len(packed.codes)).double() if packed.zero is None else packed.zero.double()
    spread = (packed.codes.double() - zc[:, None]).abs().sum(1)
    terms = a @ packed.codes.double().abs().T + a.sum(1, keepdim=True) * zc.abs() + za * spread
    return rounded @ made.T, terms * coded.scale.double() * packed.scale.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "grid"), [(8, "g_sym"), (8, "g_asym"), (4, "omni"), (4, "hqq"), (2, "absmax")])
@pytest.mark.parametrize(
    "scheme",
    [ActivationScheme(8), ActivationScheme(8, symmetric=False), ActivationScheme(4, clip=0.9), ActivationScheme(6, symmetric=False)],
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 5), (7, 40, 64), (33, 8, 200)])
def test_it_is_the_product_of_an_evaluation(backend: str, bits: int, grid: str, scheme: ActivationScheme, m: int, n: int, k: int) -> None:
    tensor, x = weight(n, k, bits, grid), inputs(m, k)
    run = kernel("int8_linear", backend).run
    got = run.int8_linear(x, run.prepare(tensor, scheme))
    want, terms = simulated(x, tensor, scheme)
    assert got.dtype is torch.float32
    # float32 rounds each of the three terms, two sums of them, two products with scales, and (in the simulation) values of both factors.
    assert ((got.double() - want).abs() <= 10 * 2.0**-24 * terms).all()


def test_one_scale_per_tensor_is_one_per_row() -> None:
    tensor, scheme = weight(6, 16, 8, per_tensor=True), ActivationScheme(8)
    packed = prepare(tensor, scheme)
    assert packed.scale.shape == (6,)
    want, terms = simulated(inputs(3, 16), tensor, scheme)
    assert ((kernel("int8_linear").run.int8_linear(inputs(3, 16), packed).double() - want).abs() <= 10 * 2.0**-24 * terms).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 4097), (2, 3, 16), (3, 37, 1040), (5, 33, 2063)])
def test_sums_are_exact_where_float32_is_not(backend: str, m: int, n: int, k: int) -> None:
    """Of the largest codes, whose products are odd: 4,097 of them need 27 bits. Rows and columns that no tile holds whole."""
    g = torch.Generator().manual_seed(k)
    x = torch.full((m, k), 127.0) if k == 4097 else torch.randint(-127, 128, (m, k), generator=g).float().clamp_(-126, 126)
    x[:, 0] = 127  # so that a step is 1
    codes = torch.full((n, k), 255) if k == 4097 else torch.randint(0, 256, (n, k), generator=g)
    tensor = AffineTensor(codes.to(torch.uint8), torch.ones(n, 1), torch.full((n, 1), 128, dtype=torch.uint8), 8, ZeroKind.CONSTANT)
    run = kernel("int8_linear", backend).run
    got = run.int8_linear(x, run.prepare(tensor, ActivationScheme(8)))
    assert torch.equal(got, (x.long() @ (codes - 128).T).float())


def test_a_token_does_not_depend_on_the_others() -> None:
    run = kernel("int8_linear").run
    packed, x = prepare(weight(24, 64, 4), ActivationScheme(8, symmetric=False)), inputs(40, 64, torch.bfloat16)
    assert torch.equal(run.int8_linear(x, packed)[3:5], run.int8_linear(x[3:5], packed))


def test_a_token_that_is_not_a_number_stays_alone() -> None:
    x = inputs(3, 16)
    x[1, 2] = torch.nan
    got = kernel("int8_linear").run.int8_linear(x, prepare(weight(4, 16, 8), ActivationScheme(8)))
    assert got.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (ActivationScheme(8, granularity=Granularity.TENSOR), "dynamic range per token"),
        (ActivationScheme(8, granularity=Granularity.TENSOR, dynamic=False), "dynamic range per token"),
        (ActivationScheme(8, number="fp8_e4m3"), "integer activations"),
        (ActivationScheme(8, outlier_threshold=6.0), "stay in 16 bits"),
    ],
)
def test_activations_without_a_scale_per_token_are_refused(scheme: ActivationScheme, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(weight(4, 16, 8), scheme)


def test_weights_without_a_scale_per_row_are_refused() -> None:
    plain = weight(4, 16, 8)
    grouped = AffineTensor(plain.codes, plain.scale.repeat(1, 2), plain.zero.repeat(1, 2), 8, plain.kind)
    scaled = AffineTensor(plain.codes, plain.scale, plain.zero, 8, plain.kind, input_scale=torch.ones(16))
    wide = AffineTensor(
        torch.zeros(1, MOST_COLUMNS + 1, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 8, plain.kind
    )
    lowest = AffineTensor(plain.codes, plain.scale, plain.scale, 8, ZeroKind.MINIMUM)
    for tensor, message in ((grouped, "2 groups a row"), (scaled, "input scale"), (wide, "131072 columns"), (lowest, "units of codes")):
        with pytest.raises(ValueError, match=message):
            prepare(tensor, ActivationScheme(8))


@pytest.mark.parametrize("scheme", [ActivationScheme(8), ActivationScheme(5, symmetric=False)])
def test_the_library_of_torch_gives_the_same(scheme: ActivationScheme) -> None:
    """Also where it is too slow to be chosen."""
    packed, x = prepare(weight(12, 100, 4), scheme), inputs(5, 100)
    assert torch.equal(eager.int8_linear(x, packed), kernel("int8_linear").run.int8_linear(x, packed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_type_is_the_product_rounded(backend: str) -> None:
    run = kernel("int8_linear", backend).run
    packed, x = run.prepare(weight(9, 32, 8), ActivationScheme(8, symmetric=False)), inputs(3, 32)
    got = run.int8_linear(x, packed, torch.bfloat16)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, run.int8_linear(x, packed).bfloat16())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    packed, x = prepare(weight(200, 300, 8), ActivationScheme(8)), inputs(9, 300)
    want, before = kernel("int8_linear").run.int8_linear(x, packed), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kernel("int8_linear").run.int8_linear(x, packed), want)
    finally:
        torch.set_num_threads(before)


def test_zeros_of_symmetric_grids_are_left_out() -> None:
    assert prepare(weight(4, 16, 8, "absmax"), ActivationScheme(8)).zero is None
    assert prepare(weight(4, 16, 8, "g_asym"), ActivationScheme(8)).zero is not None
