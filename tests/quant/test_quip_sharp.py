"""QuIP# whole: block LDLQ on the codebooks, the stored format, sizes and refusals."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.errors import NonFiniteError
from quant.hadamard import hadamard_matrix
from quant.lattice import CODEBOOKS
from quant.ldlq import coordinate_pass
from quant.methods.base import Linear
from quant.methods.quip_sharp import QuipSharp
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors import unpack
from quant.tensors.lattice import LatticeTensor, bits_formula
from tests.quant.test_quip import problem, proxy


def scheme(bits: int) -> WeightScheme:
    return WeightScheme(bits, granularity=Granularity.TENSOR)


def stored(w: Tensor, h: Tensor, bits: int = 2, **params: object) -> LatticeTensor:
    tensor = quantize_linear(w, method="quip_sharp", bits=bits, hessian=h, **params)
    assert isinstance(tensor, LatticeTensor)
    return tensor


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_stored_tensor_is_the_inverse_transform_of_its_codewords(bits: int) -> None:
    w, h = problem(12, 40, 1, torch.float32)
    t = stored(w, h, bits, tune_iters=1)
    words = CODEBOOKS[bits].decode(list(t.codes)).double().view(12, 40) * t.scale.double()
    left, right = hadamard_matrix(12), hadamard_matrix(40)
    want = (1 - 2 * t.signs_out.double())[:, None] * (left @ words @ right.T) * (1 - 2 * t.signs_in.double())
    torch.testing.assert_close(t.dequantize().double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_reported_loss_is_the_output_error_and_tuning_lowers_it(bits: int) -> None:
    w, h = problem(16, 32, 2)
    mean = h.diagonal().mean()
    ridged = h / mean + 0.01 * torch.eye(32, dtype=h.dtype)
    for tune_iters in (0, 4):
        result = QuipSharp(tune_iters=tune_iters).quantize(w, Statistics(hessian=h), scheme(bits))
        # The tensor is float32: its error against the float64 values is 1e-7 of the weights.
        got = proxy(w, result.tensor.dequantize(), ridged)
        assert got == pytest.approx(result.details["proxy_loss_tuned"], rel=1e-5)
        if tune_iters == 0:
            assert got == pytest.approx(result.details["proxy_loss"], rel=1e-5)
        else:
            assert result.details["proxy_loss_tuned"] < result.details["proxy_loss"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_sweep_raises_the_error_of_any_row(bits: int) -> None:
    """Few tokens, so that the codeword nearest to a block's optimum is often not the one that costs least."""
    w, k = problem(16, 64, 1)[0], 64
    x = torch.randn(12, k, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    h = x.T @ x
    ridged = h / h.diagonal().mean() + 0.01 * torch.eye(k, dtype=h.dtype)
    rows = []
    for tune_iters in range(6):
        t = stored(w, h, bits, tune_iters=tune_iters)
        error = hadamard_matrix(16).T @ ((1 - 2 * t.signs_out.double())[:, None] * (w - t.dequantize()))  # rows as they are rounded
        rows.append(((error @ ridged) * error).sum(1))
    # Both are decoded in float32: an error D of 2^-24 of each weight, all below 5, of which a row has |D| at most, as D H D is at most
    # trace(H) |D|². Each loss L is then off by 2 √(L D H D).
    off = 2.0**-24 * 5 * w.numel() ** 0.5
    for before, after in pairwise(rows):
        assert bool((after <= before + 4 * (before * ridged.trace()).sqrt() * off).all())
    assert float(rows[-1].sum()) < 0.9 * float(rows[0].sum())


def test_coordinate_passes_go_to_the_real_optimum_of_every_block() -> None:
    w, h = problem(3, 16, 4)
    # With rounding left out, one pass is block Gauss-Seidel on E H = 0: every block's gradient is zero when it is set.
    gradients: list[float] = []
    values = torch.zeros_like(w)

    def keep(first: int, target: Tensor) -> Tensor:
        moved = values.clone()
        moved[:, first : first + 8] = target
        gradients.append(float((((w - moved) @ h)[:, first : first + 8]).abs().max()))
        values[:, first : first + 8] = target
        return target

    coordinate_pass(w, values.clone(), h, keep, 8)
    assert len(gradients) == 2
    assert max(gradients) < 1e-9 * float(h.abs().max())


def test_two_bits_beat_rounding_to_nearest_by_far() -> None:
    for seed in range(4):
        w, h = problem(24, 64, seed, torch.float32)
        w[:, 3] *= 6
        lattice = proxy(w, stored(w, h, tune_iters=2).dequantize(), h)
        assert lattice < 0.5 * proxy(w, quantize_linear(w, method="rtn", bits=2, mse=True).dequantize(), h)
        assert lattice < proxy(w, quantize_linear(w, method="gptq", bits=2, hessian=h).dequantize(), h)


def test_more_bits_are_closer_and_the_error_is_the_codebooks() -> None:
    w, _ = problem(64, 128, 5, torch.float32)
    errors = [float((stored(w, torch.eye(128), bits, tune_iters=0).dequantize() - w).square().mean()) for bits in (2, 3, 4)]
    # 1024 Gaussian vectors, an identity Hessian: nothing is fed back. The sample's deviation is about 1 %.
    for error, mse in zip(errors, (0.0902, 0.0291, 0.00947), strict=True):
        assert error == pytest.approx(mse, rel=0.05)


@pytest.mark.parametrize(("bits", "shape"), [(2, (7, 16)), (3, (12, 40)), (4, (1, 8)), (2, (44, 88))])
def test_stored_bits_pack_and_unpack(bits: int, shape: tuple[int, int]) -> None:
    w, h = problem(*shape, 4, torch.float32)
    tensor = stored(w, h, bits, tune_iters=0)
    payload = tensor.pack()
    again = unpack(tensor.format, payload, json.loads(json.dumps(tensor.meta())))
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(again.pack().values(), payload.values(), strict=True))
    assert tensor.shape == shape
    assert tensor.bits_nominal == bits
    assert 0 <= (tensor.bits_stored - bits_formula(bits, *shape)) * w.numel() < 8 * len(payload)
    s = torch.linspace(0.5, 2, shape[1])
    scaled = tensor.with_input_scale(s)
    assert torch.equal(scaled.dequantize(), tensor.dequantize() / s)
    assert torch.equal(unpack(scaled.format, scaled.pack(), scaled.meta()).dequantize(), scaled.dequantize())


def test_published_overhead_is_a_bit_per_row_and_column() -> None:
    assert bits_formula(2, 4096, 4096) == pytest.approx(2.0005, abs=2e-5)


def test_codes_of_another_shape_are_refused() -> None:
    w, h = problem(4, 16, 1, torch.float32)
    t = stored(w, h, tune_iters=0)
    with pytest.raises(ValueError, match=r"codes of shapes \[\(4, 2\)\] do not belong to a weight of shape \(4, 24\)"):
        unpack("lattice", t.pack(), {"shape": [4, 24], "bits": 2})


def test_same_seed_same_bits_and_linears_differ() -> None:
    w, h = problem(8, 16, 1, torch.float32)
    method, statistics = QuipSharp(tune_iters=0), Statistics(hessian=h)
    a, b, c = (method.quantize(w, statistics, scheme(2), Linear(name)).tensor.pack() for name in ("x", "x", "y"))
    assert all(torch.equal(s, t) for s, t in zip(a.values(), b.values(), strict=True))
    assert not torch.equal(a["codes0"], c["codes0"])


def test_sizes_without_a_hadamard_matrix_are_transformed_in_blocks_and_said() -> None:
    w, h = problem(22, 88, 3, torch.float32)
    result = QuipSharp(tune_iters=1).quantize(w, Statistics(hessian=h), scheme(4))
    assert result.notes == [
        "no Hadamard matrix of order 22 is known here: the outputs are transformed in blocks of 2",
        "no Hadamard matrix of order 88 is known here: the inputs are transformed in blocks of 8",
    ]
    assert float((result.tensor.dequantize() - w).norm() / w.norm()) < 0.25


def test_edge_cases() -> None:
    w, h = problem(8, 16, 6, torch.float32)
    dead = h.clone()
    dead[5], dead[:, 5] = 0, 0
    cases = {
        "zeros": (torch.zeros(8, 16), h),
        "equal": (torch.full((8, 16), 0.37), h),
        "zero row": (w.masked_fill(torch.arange(8)[:, None] == 3, 0), h),
        "one row": (w[:1], h),
        "dead": (w, dead),
        "nobody": (w, torch.zeros(16, 16)),
        "half": (w.half(), h),
        "brain": (w.bfloat16(), h),
        "double": (w.double(), h),
        "rank one": (w, torch.ones(16, 16)),
    }
    for name, (weight, hessian) in cases.items():
        before = weight.clone()
        q = stored(weight, hessian, 4, tune_iters=1).dequantize()
        assert torch.equal(weight, before), name
        assert torch.isfinite(q).all(), name
        if name == "zeros":
            assert not q.any()
        if name not in ("dead", "rank one", "equal"):
            assert float((q - weight.float()).norm()) <= 0.4 * float(weight.float().norm()), name


def test_a_singular_hessian_without_ridge_climbs_the_ladder() -> None:
    w, _ = problem(4, 16, 1, torch.float32)
    indefinite = torch.diag(torch.arange(1.0, 17.0))
    indefinite[0, 1] = indefinite[1, 0] = 1.9
    result = QuipSharp(ridge=0.0, tune_iters=1).quantize(w, Statistics(hessian=indefinite), scheme(2))
    assert result.damp is not None
    assert result.damp > 0
    assert "was not positive definite" in result.notes[-1]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"bits": 5}, "quip_sharp does not make weight.bits=5; it makes 2, 3, 4"),
        ({"group_size": 8}, "quip_sharp does not work with weight.granularity=group; it works with tensor, channel"),
        ({"ridge": -1.0}, r"ridge=-1\.0 is not .* from 0"),
        ({"tune_iters": -1}, "tune_iters=-1 is not .* from 0"),
        ({"scale_override": 0.0}, r"scale_override=0\.0 is not .* above 0"),
        ({"hessian": torch.eye(8)}, r"the Hessian has shape \(8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(params: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize_linear(torch.ones(2, 16), method="quip_sharp", **{"bits": 2, "hessian": torch.eye(16), **params})  # type: ignore[arg-type]


def test_widths_and_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features=12 is not a multiple of 8: quip_sharp codes eight weights together"):
        stored(torch.ones(2, 12), torch.eye(12))
    with pytest.raises(NonFiniteError, match="weight"):
        stored(torch.full((2, 8), float("inf")), torch.eye(8))
    with pytest.raises(
        NonFiniteError, match=r"the transformed weight, or its scale, would exceed .*weights reach 1e\+38; divide the weight"
    ):
        stored(torch.full((2, 8), 1e38), torch.eye(8))


def test_scale_override_sets_the_rms_of_what_is_rounded() -> None:
    w, h = problem(16, 32, 7, torch.float32)
    plain, smaller = stored(w, h, tune_iters=0), stored(w, h, tune_iters=0, scale_override=0.9)
    assert float(smaller.scale / plain.scale) == pytest.approx(1.03 / 0.9, rel=1e-6)
    result = QuipSharp().quantize(w, Statistics(hessian=h), WeightScheme(2))
    assert result.notes == ["quip_sharp has one scale for the whole matrix: granularity channel is not used"]
