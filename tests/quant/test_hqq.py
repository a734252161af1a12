"""HQQ: golden values, a slow loop of scalars, both axes, and its stored format for axis 0."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import quantize_linear
from quant.accounting import bits_formula
from quant.affine import ZeroKind
from quant.errors import NonFiniteError
from quant.kernels import TABLE, kernel, recorded, unavailable
from quant.kernels.hqq_pack import Search
from quant.methods.hqq import Hqq
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors import unpack
from quant.tensors.strided import StridedTensor
from tests.quant.golden_inputs import output_error, relative_error, weight

GOLDEN = [
    (3, 0, False, 0.235201, 135520, -130.335, None),
    (3, 0, True, 0.226609, 123367, -136.295, (1.83894, 0.37854, 1.13401, 2.4782)),
    (4, 0, False, 0.110256, 29737.9, -144.319, None),
    (4, 0, True, 0.104129, 26538.5, -146.836, (1.73592, 0.43675, 1.0307, 2.43118)),
    (2, 1, False, 0.573712, 775387, -192.130, None),
    (2, 1, True, 0.554059, 743849, -272.194, (2.43625, -0.59536, 2.43625, 2.43625)),
    (4, 1, False, 0.113975, 31176.6, -150.039, None),
    (4, 1, True, 0.108791, 28372.6, -137.316, (1.53725, 0.32461, 0.93093, 2.14358)),
]


@pytest.mark.parametrize(("bits", "axis", "optimize", "rel", "out", "total", "first"), GOLDEN)
def test_hqq_equals_the_reference_code(bits: int, axis: int, optimize: bool, rel: float, out: float, total: float, first: Any) -> None:
    q = quantize_linear(weight(), method="hqq", bits=bits, group_size=64, axis=axis, optimize=optimize).dequantize()
    assert relative_error(q) == pytest.approx(rel, rel=1e-4)
    assert output_error(q) == pytest.approx(out, rel=1e-4)
    assert float(q.double().sum()) == pytest.approx(total, rel=1e-4)
    if first is not None:
        assert q[0, :4].tolist() == pytest.approx(first, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("round_zero", [None, False, True])
def test_zeros_are_rounded_with_four_bits_or_where_asked(round_zero: bool | None, bits: int, axis: int) -> None:
    given = {"group_size": 64, "axis": axis, "optimize": False, "round_zero": round_zero, "scale_dtype": "float32"}
    zero = quantize_linear(weight(), method="hqq", bits=bits, **given).pack()["zero"]
    assert torch.equal(zero, zero.round()) is (bits == 4 if round_zero is None else round_zero)


def slow_hqq(w: list[list[float]], bits: int, iters: int, rounded: bool) -> tuple[list[list[float]], int]:
    """Groups of plain floats ▸ their dequantized values and the steps taken; written from the specification."""
    top = round(2**bits - 1)
    p, beta, kappa = 0.7, 10.0, 1.01
    inverse, zero = [], []
    for group in w:
        width = max(group) - min(group)
        inverse.append(1.0 if width <= 1e-4 else min(top / width, 2e4))
        zero.append(-min(group) * inverse[-1])
    if rounded:
        zero = [float(round(z)) for z in zero]

    def code(x: float, i: int) -> float:
        return float(min(max(round(x * inverse[i] + zero[i]), 0), top))

    best, steps = 1e4, 0
    for _ in range(iters):
        steps += 1
        total, count, new = 0.0, 0, []
        for i, group in enumerate(w):
            moved = 0.0
            for x in group:
                c = code(x, i)
                e = x - (c - zero[i]) / inverse[i]
                shrunk = 0.0 if e == 0 else math.copysign(max(abs(e) - abs(e) ** (p - 1) / beta, 0.0), e)
                moved += c - (x - shrunk) * inverse[i]
                total, count = total + abs(e), count + 1
            new.append(moved / len(group))
        zero = new
        if total / count >= best:
            break
        best, beta = total / count, beta * kappa
    return [[(code(x, i) - zero[i]) / inverse[i] for x in group] for i, group in enumerate(w)], steps


@settings(max_examples=20, deadline=None)
@given(bits=st.integers(1, 6), axis=st.integers(0, 1), seed=st.integers(0, 999), iters=st.integers(1, 25))
def test_steps_are_those_of_a_loop_over_scalars(bits: int, axis: int, seed: int, iters: int) -> None:
    w = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    scheme = WeightScheme(bits, granularity=Granularity.GROUP, group_size=3, scale_dtype="float32")
    result = Hqq(axis=axis, iters=iters).quantize(w, Statistics(), scheme)
    cells = [[(r, c + i) for i in range(3)] for r in range(6) for c in range(0, 12, 3)]
    if axis == 0:
        cells = [[(r + 2 * i, c) for i in range(3)] for r in range(2) for c in range(12)]
    values, steps = slow_hqq([[float(w[at]) for at in group] for group in cells], bits, iters, bits == 4)
    want = torch.empty_like(w)
    for group, found in zip(cells, values, strict=True):
        for at, v in zip(group, found, strict=True):
            want[at] = v
    assert result.details == {"steps": steps}
    # Scales and zeros (below 2^6 here) are stored in float32: 2^-24 relative each, of values up to 2^7 steps.
    limit = float((w.amax() - w.amin()) / (2**bits - 1)) * 2**7 * 2**-23 + float(w.abs().max()) * 2**-22
    assert float((result.tensor.dequantize().double() - want).abs().max()) <= limit


@pytest.mark.parametrize("backend", [b for b in ("cpu", "triton") if unavailable("hqq_pack", b) is None])
@pytest.mark.parametrize(("scale_dtype", "width", "bits"), [(torch.float16, 32, 3), (torch.float32, 24, 4), (torch.float16, 43, 1)])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_the_kernel_takes_the_steps_of_torch(scale_dtype: torch.dtype, width: int, bits: int, size: float, backend: str) -> None:
    """Bit for bit. Errors beyond 10^(-1/1.3) = 0.17 are not shrunk to 0: torch takes such a step, and the record says so."""
    w = size * torch.randn(9, 5 * width, generator=torch.Generator().manual_seed(width))
    w[3, :width], w[4, :width] = 0, size
    search = Search(20, 0.7, 10.0, 1.01)
    want, steps = kernel("hqq_pack", "reference").run.hqq_pack(w, bits, width, scale_dtype, search, bits == 4, error=True)
    with recorded() as chosen:
        got, taken = kernel("hqq_pack", backend).run.hqq_pack(w, bits, width, scale_dtype, search, bits == 4, error=True)
    assert chosen == {"hqq_pack": [backend] if size < 1 else [backend, "reference"]}
    assert taken == steps
    for name in ("codes", "stream", "scale", "zero", "told"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    # Values are off by 2^-24 of 2^bits steps, errors by as much.
    torch.testing.assert_close(got.error, want.error, rtol=2.0**-16, atol=1e-12)


@pytest.mark.parametrize("backend", [b for b in TABLE["hqq_pack"] if unavailable("hqq_pack", b) is None])
def test_a_transposed_weight_has_the_result_of_its_copy(backend: str) -> None:
    """As linears of GPT-2 are stored."""
    w = 0.02 * torch.randn(64, 9, generator=torch.Generator().manual_seed(3)).T
    run = kernel("hqq_pack", backend).run
    made = [run.hqq_pack(given, 3, 32, torch.float16, Search(20, 0.7, 10.0, 1.01), False)[0] for given in (w, w.contiguous())]
    for name in ("codes", "stream", "scale", "zero", "told"):
        assert torch.equal(*(getattr(m, name) for m in made)), name


def test_axis_zero_of_a_column_is_axis_one_of_its_groups_of_rows() -> None:
    w = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    zero = quantize_linear(w, method="hqq", bits=3, axis=0, group_size=4, optimize=False).dequantize()
    for start in range(3):
        rows = list(range(start, 12, 3))
        one = quantize_linear(w[rows].T.contiguous(), method="hqq", bits=3, optimize=False).dequantize()
        torch.testing.assert_close(zero[rows], one.T, rtol=0, atol=0)


def test_the_optimization_lowers_the_p_norm_of_the_error() -> None:
    w = torch.randn(16, 128, generator=torch.Generator().manual_seed(2)) ** 3
    for axis in (0, 1):
        plain, moved = (
            float((quantize_linear(w, method="hqq", bits=3, group_size=16, axis=axis, optimize=o).dequantize() - w).abs().pow(0.7).sum())
            for o in (False, True)
        )
        assert moved < plain


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("axis", "group"), [(0, 6), (0, 5), (0, None), (1, 5), (1, None)])
def test_stored_bits_pack_and_unpack(axis: int, group: int | None, bits: int, scale_dtype: str) -> None:
    w = torch.randn(12, 25, generator=torch.Generator().manual_seed(4))
    tensor = quantize_linear(w, method="hqq", bits=bits, axis=axis, group_size=group, scale_dtype=scale_dtype)
    again = unpack(tensor.format, tensor.pack(), json.loads(json.dumps(tensor.meta())))
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(again.pack().values(), tensor.pack().values(), strict=True))
    size = group or (12 if axis == 0 else 25)
    formula = bits + 2 * (16 if scale_dtype == "float16" else 32) / size
    if axis == 1:
        granularity = Granularity.CHANNEL if group is None else Granularity.GROUP
        scheme = WeightScheme(bits, granularity=granularity, group_size=group, scale_dtype=scale_dtype)
        assert formula == pytest.approx(bits_formula(scheme, (12, 25), ZeroKind.FLOAT))
    assert 0 <= (tensor.bits_stored - formula) * w.numel() < 8 * len(tensor.pack())
    assert tensor.bits_nominal == bits
    scaled = tensor.with_input_scale(torch.linspace(0.5, 2, 25))
    torch.testing.assert_close(scaled.dequantize(), tensor.dequantize() / torch.linspace(0.5, 2, 25))
    back = unpack(scaled.format, scaled.pack(), scaled.meta())
    assert torch.equal(back.dequantize(), scaled.dequantize())


def test_a_strided_tensor_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codes \(2, 4\), scale \(3,\) and zero \(3,\) do not belong together"):
        StridedTensor(torch.zeros(2, 4, dtype=torch.uint8), torch.ones(3), torch.ones(3), 2)


def edge_cases() -> dict[str, Tensor]:
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
    return {
        "zeros": torch.zeros(8, 16),
        "equal": torch.full((8, 16), 0.37),
        "one row": w[:1],
        "zero row": w.masked_fill(torch.arange(8)[:, None] == 3, 0),
        "half": w.half(),
        "brain": w.bfloat16(),
        "tiny": w * 1e-7,
    }


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", sorted(edge_cases()))
def test_edge_cases_stay_close(case: str, axis: int, scale_dtype: str) -> None:
    w = edge_cases()[case]
    before = w.clone()
    q = quantize_linear(w, method="hqq", bits=8, axis=axis, group_size=8, scale_dtype=scale_dtype).dequantize()
    assert torch.equal(w, before)
    # A group narrower than 1e-4 has the scale 1, by the reference's rule: its float zero alone says where it is.
    limit = 0.02 * float(w.float().abs().max()) if case != "tiny" else 1e-3
    assert float((q - w.float()).abs().max()) <= limit


def test_zeros_beyond_float16_are_kept_in_float32_and_said() -> None:
    w = 100 + torch.rand(4, 16, generator=torch.Generator().manual_seed(6)) / 10
    for axis in (0, 1):
        scheme = WeightScheme(4, granularity=Granularity.GROUP, group_size=4)
        result = Hqq(axis=axis).quantize(w, Statistics(), scheme)
        assert "do not fit float16; scales are stored in float32" in result.notes[0]
        assert float((result.tensor.dequantize() - w).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"axis": 2}, "axis=2 is not .* from 0 to 1"),
        ({"iters": 0}, "iters=0 is not .* from 1"),
        ({"p": 0.0}, r"p=0\.0 is not .* above 0"),
        ({"group_size": 5}, "group_size=5 does not divide in_features=16"),
        ({"group_size": 5, "axis": 0}, r"group_size=5 does not divide the 128 weights of shape \(8, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize_linear(torch.randn(8, 16), method="hqq", bits=4, **params)


def test_values_that_are_not_finite_are_located_and_a_symmetric_scheme_is_noted() -> None:
    with pytest.raises(NonFiniteError, match="weight of shape"):
        quantize_linear(torch.full((2, 4), float("nan")), method="hqq", bits=4)
    assert "symmetric" in Hqq().quantize(torch.randn(2, 4), Statistics(), WeightScheme(4, True)).notes[0]
