"""Sums of integers on a CUDA device: every tile that a product may be made with, against the same sums in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from quant.affine import ZeroKind
from quant.kernels import kernel
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.int8_linear import Packed, triton
from quant.kernels.int8_linear.triton import HOPPER, PLAIN, Tile, gluon_works
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor

pytestmark = pytest.mark.gpu("triton")


def problem(m: int, n: int, k: int, zeros: bool, symmetric: bool) -> tuple[RowCodes, Packed]:
    """Scales are powers of two and zeros whole numbers below 4, so that float32 holds every term of a result below 2^24 exactly."""
    g = torch.Generator("cuda").manual_seed(m + n + k)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, device="cuda")

    codes, weight = whole(-128, 128, m, k).to(torch.int8), whole(-128, 128, n, k).to(torch.int8)
    zero = whole(-3, 4, n).float()
    row_zero = whole(-3, 4, m, 1).float() * (not symmetric)
    sums = (weight.sum(1, dtype=torch.int64).double() - k * (zero.double() if zeros else 0.0)).float()
    rows = RowCodes(codes, 2.0 ** whole(-4, 5, m, 1).float(), row_zero)
    return rows, Packed(weight, 2.0 ** whole(-4, 5, n).float(), zero if zeros else None, sums, 8, symmetric, 1.0)


def exact(rows: RowCodes, packed: Packed) -> Tensor:
    zero = 0.0 if packed.zero is None else packed.zero.double()[:, None]
    weight = (packed.codes.double() - zero) * packed.scale.double()[:, None]
    return ((rows.codes.double() - rows.zero.double()) * rows.scale.double()) @ weight.T


STAYS = Tile(128, 256, 128, 8, 3, 1.0, gluon=False, stay=True)
FORMS = list(product((torch.bfloat16, torch.float32), (True, False), (False, True)))
"""Type of out, symmetric activations, a weight with zeros. Each is compiled apart: all for one tile, one for each of the others."""
CASES = [(HOPPER[0], *form) for form in FORMS] + [(t, *FORMS[i % len(FORMS)]) for i, t in enumerate((*HOPPER[1:], *PLAIN, STAYS))]


@pytest.mark.parametrize(("tile", "dtype", "symmetric", "zeros"), CASES, ids=str)
def test_every_tile_sums_up_exactly(tile: Tile, dtype: torch.dtype, symmetric: bool, zeros: bool) -> None:
    """Also rows and columns that no tile holds whole, fewer steps than stages, and one row."""
    if (tile.gluon or tile.descriptors) and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors are for compute capability 9.0")
    if tile.gluon and not gluon_works():
        pytest.skip("this Triton has another Gluon")
    for m, n, k in ((300, 528, 1040), (1, 144, 128), (257, 16, 80), (2048, 1536, 512)):
        rows, packed = problem(m, n, k, zeros, symmetric)
        want = exact(rows, packed).float().to(dtype)
        for first in (False, True):
            out = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
            triton.run(tile, rows.codes, rows, packed, out, first)
            assert torch.equal(out, want), (m, n, k, first)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (16, 64, 96), (40, 11008, 512), (5, 33, 77), (700, 1001, 4096)])
def test_linears_on_a_device_are_those_of_the_reference(m: int, n: int, k: int) -> None:
    """Each of some ten roundings of float32 is relative to the largest term, k products of at most 2^14 and their zeros' alike."""
    g = torch.Generator("cuda").manual_seed(k)
    codes = torch.randint(0, 256, (n, k), generator=g, dtype=torch.uint8, device="cuda")
    zero = torch.randint(100, 150, (n, 1), generator=g, dtype=torch.uint8, device="cuda")
    tensor = AffineTensor(codes, torch.rand(n, 1, generator=g, device="cuda") / 128, zero, 8, ZeroKind.CODE)
    x = torch.randn(m, k, generator=g, device="cuda").bfloat16()
    for scheme in (ActivationScheme(8), ActivationScheme(8, symmetric=False)):
        chosen, plain = (kernel("int8_linear", name, "cuda").run for name in ("triton", "reference"))
        packed = chosen.prepare(tensor, scheme)
        got, want = chosen.int8_linear(x, packed), plain.int8_linear(x, packed)
        rows = chosen.rounded(x, packed)
        bound = 10 * 2.0**-24 * 3 * 2.0**14 * k * rows.scale.double() * packed.scale.double()
        assert ((got.double() - want.double()).abs() <= bound).all()
        assert torch.equal(chosen.int8_linear(x, packed, torch.bfloat16), got.bfloat16())


def test_codes_are_summed_in_passing() -> None:
    x = torch.randn(9, 5000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    made = kernel("fake_quantize", "triton", "cuda").run.encode(x, 8, False)
    assert torch.equal(made.sums, made.codes.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("n", [256, 4096, 5000, 20000])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (2, True)])
def test_rows_near_ties_have_the_codes_of_exact_quotients(n: int, bits: int, symmetric: bool) -> None:
    """Values next to half a step from two codes, of rows that registers hold and of longer ones, and scales of all sizes."""
    g = torch.Generator("cuda").manual_seed(n)
    half = 2 ** (bits - 1)
    ties = torch.randint(-half, half, (40, n), generator=g, device="cuda") + 0.5
    ties[:, 0], ties[:, 1] = half - 1, -half
    x = ties * torch.logspace(-6, 36, 40, device="cuda")[:, None] * torch.rand(40, 1, generator=g, device="cuda")
    x = torch.nextafter(x, torch.where(torch.rand(x.shape, generator=g, device="cuda") < 0.5, 0.0, 2 * x))
    ours, plain = (kernel("fake_quantize", name, "cuda").run for name in ("triton", "reference"))
    for values in (x, x[:30].bfloat16()):
        got, want = ours.encode(values, bits, symmetric), plain.encode(values, bits, symmetric)
        assert all(torch.equal(getattr(got, part), getattr(want, part)) for part in ("codes", "scale", "zero"))
        assert torch.equal(got.sums, want.codes.sum(1, dtype=torch.int32))
        assert torch.equal(ours.fake_quantize(values, bits, symmetric), plain.fake_quantize(values, bits, symmetric))
