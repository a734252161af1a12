"""LDLQ against its identities and against GPTQ, the butterflies, QuIP whole, and its stored format."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import quantize_linear
from quant.affine import Affine, ZeroKind
from quant.butterfly import Butterfly, balanced_factors
from quant.errors import NonFiniteError, QuantizationWarning, SingularHessianError
from quant.factors import inverse_factor
from quant.ldlq import coordinate_pass, feedback, solve_from_last
from quant.methods.base import Linear
from quant.methods.gptq import Gptq
from quant.methods.quip import Quip
from quant.scheme import Granularity, WeightScheme
from quant.solver import solve_columns
from quant.statistics import Statistics
from quant.tensors import unpack
from quant.tensors.affine import AffineTensor
from quant.tensors.incoherent import IncoherentTensor
from tests.quant.test_gptq import proxy


def problem(n: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Weight `[N, K]` and the Hessian of correlated tokens."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g, dtype=dtype)
    x = torch.randn(4 * k + 8, k, generator=g, dtype=dtype)
    x = x @ (torch.eye(k, dtype=dtype) + 0.3 * torch.randn(k, k, generator=g, dtype=dtype))
    return w, 2 * x.T @ x


def nearest(step: float, low: float = -2.0, high: float = 1.5) -> Affine:
    return Affine(torch.tensor(step), torch.tensor(-low / step), round((high - low) / step + 1).bit_length() - 1, ZeroKind.CONSTANT)


GRID = nearest(0.5)


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 5), blocks=st.integers(1, 20), block=st.sampled_from([1, 2, 8]), seed=st.integers(0, 999))
def test_the_factors_and_summed_errors_are_those_of_the_hessian(n: int, blocks: int, block: int, seed: int) -> None:
    k = blocks * block
    w, h = problem(n, k, seed)
    fed = feedback(h, 0.0, block)
    d = torch.block_diag(*fed.diagonal)
    torch.testing.assert_close(fed.unit @ d @ fed.unit.T, h, rtol=1e-10, atol=1e-10 * float(h.abs().max()))
    eye = torch.eye(block, dtype=h.dtype)
    for i in range(0, k, block):
        torch.testing.assert_close(fed.unit[i : i + block, i : i + block], eye, rtol=0, atol=1e-12)
        assert not fed.unit[i : i + block, i + block :].any()
    values, loss = solve_from_last(w, fed, lambda _, x: GRID.round(x))
    e = w - values
    torch.testing.assert_close(loss, torch.einsum("nk,kl,nl->n", e, h, e), rtol=1e-10, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 5), k=st.integers(1, 300), seed=st.integers(0, 999))
def test_mirrored_ldlq_is_gptq(n: int, k: int, seed: int) -> None:
    w, h = problem(n, k, seed)
    solved = solve_columns(w.T.contiguous(), inverse_factor(h, 0.01)[0], 128, lambda _j, c, _w: (GRID.encode(c), GRID.round(c)))
    mirrored, _ = solve_from_last(w.flip(1), feedback(h.flip(0, 1), 0.01), lambda _, x: GRID.round(x))
    assert torch.equal(mirrored.flip(1), solved.values.T)


@pytest.mark.parametrize(("symmetric", "group"), [(False, None), (True, None), (False, 8)])
def test_ldlq_alone_in_mirrored_order_has_the_codes_of_gptq(symmetric: bool, group: int | None) -> None:
    w, h = problem(6, 32, 1)
    granularity = Granularity.CHANNEL if group is None else Granularity.GROUP
    scheme = WeightScheme(3, symmetric, granularity, group, "float32")
    gptq = Gptq(static_groups=True).quantize(w, Statistics(hessian=h), scheme).tensor
    mirrored = Quip(incoherence=False).quantize(w.flip(1), Statistics(hessian=h.flip(0, 1)), scheme)
    assert isinstance(gptq, AffineTensor)
    assert isinstance(mirrored.tensor, AffineTensor)
    assert torch.equal(mirrored.tensor.codes.flip(1), gptq.codes)
    assert (mirrored.damp, mirrored.notes) == (0.01, [])


def test_a_diagonal_hessian_rounds_to_nearest() -> None:
    w, _ = problem(6, 24, 3, torch.float32)
    h = torch.diag(torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.1)
    for params in ({}, {"sort": True}, {"npasses": 2}):
        q = quantize_linear(w, method="quip", bits=3, hessian=h, incoherence=False, **params).dequantize()
        assert torch.equal(q, quantize_linear(w, method="rtn", bits=3).dequantize())


@pytest.mark.parametrize("sort", [False, True])
def test_a_pass_moves_every_code_to_its_best_with_the_others_fixed(sort: bool) -> None:
    moved = 0
    for seed in range(4):
        w, h = problem(3, 12, seed)
        made = [Quip(incoherence=False, sort=sort, npasses=n).quantize(w, Statistics(hessian=h), WeightScheme(3)).tensor for n in (0, 1)]
        before, after = (t for t in made if isinstance(t, AffineTensor))
        scale, zero = before.scale.double(), before.zero.double()
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(12, dtype=h.dtype)
        codes = before.codes.clone()
        for j in reversed(torch.argsort(h.diagonal()).tolist() if sort else range(12)):
            for row in range(3):
                trials = codes[row].repeat(8, 1)
                trials[:, j] = torch.arange(8)
                e = w[row] - (trials - zero[row]) * scale[row]
                codes[row, j] = int(torch.einsum("tk,kl,tl->t", e, damped, e).argmin())
        assert torch.equal(after.codes, codes)
        moved += int((codes != before.codes).sum())
    assert moved > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 20))
def test_greedy_passes_never_raise_the_error_and_end_where_no_single_code_can_lower_it(seed: int, k: int) -> None:
    w, h = problem(2, k, seed)
    values, _ = solve_from_last(w, feedback(h, 0.0), lambda _, x: GRID.round(x))
    last = proxy(w, values, h)
    for _ in range(50):
        moved = coordinate_pass(w, values, h, lambda _, x: GRID.round(x))
        now = proxy(w, moved, h)
        assert now <= last * (1 + 1e-12)
        if torch.equal(moved, values):
            break
        values, last = moved, now
    else:
        pytest.fail("did not settle")
    for row in range(2):
        for j in range(k):
            for step in (-0.5, 0.5):
                other = values.clone()
                other[row, j] = (other[row, j] + step).clamp(-2.0, 1.5)
                assert proxy(w, other, h) >= last * (1 - 1e-12)


def test_sorted_ldlq_equals_permuting_by_hand() -> None:
    w, h = problem(4, 16, 3)
    order = torch.argsort(h.diagonal())
    q = quantize_linear(w, method="quip", bits=3, hessian=h, incoherence=False, sort=True).dequantize()
    by_hand = quantize_linear(w[:, order], method="quip", bits=3, hessian=h[order][:, order], incoherence=False).dequantize()
    assert torch.equal(q[:, order], by_hand)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 60, 172])
def test_butterflies_are_orthogonal_and_mix_every_entry(n: int) -> None:
    p, q = balanced_factors(n)
    assert p * q == n
    assert all(n % d or d <= p for d in range(1, int(n**0.5) + 1))
    b = Butterfly.draw(n, torch.Generator().manual_seed(1))
    eye = torch.eye(n, dtype=torch.float64)
    v = b.apply(eye).T
    # Entries are rounded to float32, 2^-24 relative, in two factors.
    torch.testing.assert_close(v @ v.T, eye, rtol=0, atol=1e-6)
    assert (v != 0).all()
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(b.apply(x), x @ v.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.undo(x), x @ v, rtol=1e-12, atol=1e-12)


def spiky(n: int = 24, k: int = 48, seed: int = 5) -> tuple[Tensor, Tensor]:
    w, h = problem(n, k, seed, torch.float32)
    w[:, 3] *= 8
    w[2, 7] = 30
    return w, h


def test_transforms_spread_large_weights_and_lower_the_output_error() -> None:
    better = 0
    for seed in range(6):
        w, h = spiky(seed=seed)
        plain, incoherent = (quantize_linear(w, method="quip", bits=2, hessian=h, incoherence=i).dequantize() for i in (False, True))
        better += proxy(w, incoherent, h) < proxy(w, plain, h)
    assert better == 6


def test_the_bound_on_eight_bits_is_that_of_the_grid() -> None:
    w, h = problem(24, 60, 1, torch.float32)
    q = quantize_linear(w, method="quip", bits=8, hessian=h, width=6.0).dequantize()
    # A step is 2 · 6 RMS / 255; feedback makes errors a few times those of plain rounding, a step / √12.
    assert float((q - w).norm() / w.norm()) < 5 * 2 * 6 / 255 / 12**0.5


def test_same_seed_same_bits_and_linears_differ() -> None:
    w, h = spiky()
    scheme, statistics = WeightScheme(3, granularity=Granularity.TENSOR), Statistics(hessian=h)
    a, b, c, d = (
        Quip().quantize(w, statistics, scheme, Linear(name, seed)).tensor for name, seed in (("x", 0), ("x", 0), ("y", 0), ("x", 1))
    )
    assert all(torch.equal(s, t) for s, t in zip(a.pack().values(), b.pack().values(), strict=True))
    assert not torch.equal(a.pack()["codes"], c.pack()["codes"])
    assert not torch.equal(a.pack()["codes"], d.pack()["codes"])


@pytest.mark.parametrize(("bits", "shape"), [(2, (7, 10)), (3, (16, 24)), (4, (1, 36))])
@pytest.mark.parametrize("rescale", [False, True])
def test_stored_bits_pack_and_unpack(bits: int, shape: tuple[int, int], rescale: bool) -> None:
    w, h = problem(*shape, 4, torch.float32)
    tensor = quantize_linear(w, method="quip", bits=bits, hessian=h, rescale=rescale, scale_dtype="float16")
    assert isinstance(tensor, IncoherentTensor)
    again = unpack(tensor.format, tensor.pack(), json.loads(json.dumps(tensor.meta())))
    assert torch.equal(again.dequantize(), tensor.dequantize())
    # Codes, a scale and a seed; 16 bits a column where columns were rescaled.
    formula = bits + (32 + 64 + (16 * shape[1] if rescale else 0)) / w.numel()
    assert 0 <= (tensor.bits_stored - formula) * w.numel() < 8
    assert tensor.bits_nominal == bits
    s = torch.linspace(0.5, 2, shape[1])
    scaled = tensor.with_input_scale(s)
    torch.testing.assert_close(scaled.dequantize(), tensor.dequantize() / s, rtol=1e-6, atol=0)
    assert torch.equal(unpack(scaled.format, scaled.pack(), scaled.meta()).dequantize(), scaled.dequantize())


@pytest.mark.parametrize("incoherence", [False, True])
def test_edge_cases(incoherence: bool) -> None:
    w, h = problem(8, 16, 6, torch.float32)
    dead = h.clone()
    dead[5], dead[:, 5] = 0, 0
    cases = {
        "zeros": (torch.zeros(8, 16), h),
        "equal": (torch.full((8, 16), 0.37), h),
        "one row": (w[:1], h),
        "one input": (w[:, :1], h[:1, :1]),
        "dead": (w, dead),
        "nobody": (w, torch.zeros(16, 16)),
        "half": (w.half(), h),
        "brain": (w.bfloat16(), h),
        "double": (w.double(), h),
        "rank one": (w, torch.ones(16, 16)),
    }
    for name, (weight, hessian) in cases.items():
        before = weight.clone()
        for scale_dtype in ("float16", "float32"):
            q = quantize_linear(
                weight, method="quip", bits=8, hessian=hessian, incoherence=incoherence, scale_dtype=scale_dtype
            ).dequantize()
            assert torch.equal(weight, before), name
            assert torch.isfinite(q).all(), name
            if name == "zeros":
                assert not q.any()
            if name not in ("dead", "rank one"):
                # 2.4 RMS clips a Gaussian's tails: 9 % of its norm; matrices of one row or input are clipped as much.
                assert float((q - weight.float()).norm()) <= 0.2 * float(weight.float().norm()), name


@pytest.mark.parametrize("method", ["quip", "quip_sharp"])
def test_weights_of_dead_inputs_count_for_nothing(method: str) -> None:
    """One scale is for all weights: those that no input meets would take it for themselves."""
    w, h = problem(16, 32, 7, torch.float32)
    dead = torch.arange(32) % 4 == 1
    h = h.masked_fill(dead, 0).masked_fill(dead[:, None], 0)
    found = []
    for value in (0.0, 1e6):
        with pytest.warns(QuantizationWarning, match="8 of 32 inputs are always 0 on the calibration text: their weights are set to 0"):
            found.append(quantize_linear(w.masked_fill(dead, value), method=method, bits=4, hessian=h).dequantize())
    assert torch.equal(*found)


def test_notes_tell_what_was_not_used() -> None:
    w, h = problem(4, 8, 1)
    result = Quip().quantize(w, Statistics(hessian=torch.zeros_like(h)), WeightScheme(4, granularity=Granularity.GROUP, group_size=4))
    assert result.notes == [
        "quip has one scale for the whole matrix: granularity group is not used",
        "all inputs are always 0 on the calibration text: the Hessian counts as the identity",
    ]
    w, _ = problem(4, 12, 1)
    indefinite = torch.diag(torch.arange(1.0, 13.0))
    indefinite[0, 1] = indefinite[1, 0] = 1.9
    plain = Quip(incoherence=False, damp=0.001).quantize(w, Statistics(hessian=indefinite), WeightScheme(4))
    assert plain.damp == pytest.approx(0.1)
    assert "0.1 was used" in plain.notes[-1]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"width": 0.0}, r"width=0\.0 is not .* above 0"),
        ({"npasses": -1}, "npasses=-1 is not .* from 0"),
        ({"damp": -1.0}, r"damp=-1\.0 is not .* from 0"),
        ({"hessian": torch.eye(3)}, r"the Hessian has shape \(3, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(params: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize_linear(torch.ones(2, 4), method="quip", bits=4, **{"hessian": torch.eye(4), **params})  # type: ignore[arg-type]


def test_bad_values_and_hopeless_hessians_are_errors() -> None:
    with pytest.raises(NonFiniteError, match="Hessian"):
        quantize_linear(torch.ones(2, 4), method="quip", bits=4, hessian=torch.full((4, 4), float("nan")))
    h = torch.eye(4) * 1e-3
    h[0, 1] = h[1, 0] = 10
    with pytest.raises(SingularHessianError, match=r"with damping 0\.01, 0\.1, 1"):
        quantize_linear(torch.ones(2, 4), method="quip", bits=4, hessian=h)


def test_weights_too_large_to_rescale_are_told_with_what_helps() -> None:
    """A full Hessian, which is not to blame."""
    w, h = problem(12, 16, 0, torch.float32)
    large = 3e37 * w / w.abs().max()
    with pytest.raises(
        NonFiniteError, match=r"Hessian of rescaled columns would exceed 3\.4e\+38.*weights reach 3e\+37; use rescale=false"
    ):
        quantize_linear(large, method="quip", bits=4, hessian=h)
    power = 2.0**120  # exact, so that nothing but the scale may change
    plain, scaled = (quantize_linear(c * w, method="quip", bits=4, hessian=h, rescale=False) for c in (1.0, power))
    assert torch.equal(scaled.dequantize(), power * plain.dequantize())
    with pytest.raises(NonFiniteError, match=r"or its scale, would exceed .*weights reach 3e\+38; divide the weight"):
        quantize_linear(torch.full_like(w, 3e38), method="quip", bits=4, hessian=h, rescale=False)
