"""Number formats: every code by brute force, torch's own float8 types, the rules for scales, and what is stored."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.accounting import bits_formula
from quant.activation import fake_quantize_activation
from quant.methods.gptq import Gptq
from quant.methods.rtn import Rtn
from quant.number_formats import DYNAMIC, E2M1, E4M3, E5M2, FORMATS, NF4, number_format, power_of_two
from quant.scheme import NUMBERS, ActivationScheme, Granularity, Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors import unpack
from quant.tensors.floating import FloatingTensor

ELEMENTS: dict[str, Any] = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1, "nf4": NF4, "dynamic": DYNAMIC}
GROUPS = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16, "nf4": 64, "nf4_dq": 64}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def weight(n: int = 12, k: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)


def finite_codes(element: Any) -> Tensor:
    return torch.isfinite(element.values()).nonzero().flatten()


def test_the_tables_of_numbers_agree() -> None:
    assert set(FORMATS) == set(NUMBERS) - {"int"}
    assert all(NUMBERS[n].bits == f.element.bits for n, f in FORMATS.items())


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_encodes_to_itself(name: str) -> None:
    element = ELEMENTS[name]
    codes = finite_codes(element)
    assert torch.equal(element.encode(element.values()[codes]), codes)
    assert torch.equal(element.encode(element.values()[codes].double()), codes)


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_nearest_value_is_chosen(name: str) -> None:
    """Against the distance to every value, on a fine grid and beyond its ends."""
    element = ELEMENTS[name]
    values = element.values()[finite_codes(element)]
    grid = torch.linspace(-1.2 * element.top, 1.2 * element.top, 20001)
    small = element.top * 10.0 ** -torch.linspace(0, 8, 4001)
    x = torch.cat([grid, small, -small]).double()
    least = (x[:, None] - values.double()).abs().amin(1)
    got = (element.values()[element.encode(x)].double() - x).abs()
    assert torch.equal(got, least)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_ties_go_to_the_even_code(name: str) -> None:
    """Half-way points of neighbours are exact in float32."""
    element = ELEMENTS[name]
    codes = torch.arange(element.largest)
    middle = (element.values()[codes] + element.values()[codes + 1]) / 2
    want = torch.where(codes % 2 == 0, codes, codes + 1)
    half = 1 << (element.bits - 1)
    assert torch.equal(element.encode(middle), want)
    assert torch.equal(element.encode(-middle), want + half)
    assert torch.equal(element.encode(torch.nextafter(middle, torch.tensor(0.0))), codes)
    assert torch.equal(element.encode(torch.nextafter(middle, torch.tensor(1e9))), codes + 1)


@pytest.mark.parametrize("name", TORCH)
def test_fp8_codes_are_those_of_torch(name: str) -> None:
    """Every float16 value, saturated first: torch's cast makes NaN or infinity of what is too large."""
    element = ELEMENTS[name]
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    x = x[torch.isfinite(x)]
    want = x.clamp(-element.top, element.top).to(TORCH[name])
    codes = element.encode(x)
    assert torch.equal(codes.to(torch.uint8), want.view(torch.uint8))
    assert torch.equal(element.values()[codes], want.float())
    assert element.top == torch.finfo(TORCH[name]).max


def test_e2m1_has_the_values_of_the_standard() -> None:
    assert E2M1.values()[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_nf4_has_quantiles_of_the_normal_distribution() -> None:
    """The published table was made in float32: two units of the last place below 1."""
    p = 0.9677083
    steps = torch.arange(8, dtype=torch.float64)
    positive = torch.special.ndtri(p + (0.5 - p) * steps / 8)
    negative = -torch.special.ndtri(p + (0.5 - p) * steps[:7] / 7)
    want = torch.cat([positive, torch.zeros(1), negative]).sort().values / positive[0]
    torch.testing.assert_close(NF4.values().double(), want, rtol=0, atol=2**-24)
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, 0.07958029955625534, 0.7229568362236023, 1.0]
    for value in published:
        assert float((NF4.values() - value).abs().min()) <= 2**-23


def test_powers_of_two_are_exact() -> None:
    e = torch.arange(-127, 128)
    assert power_of_two(e).tolist() == [2.0**i for i in e.tolist()]


# --- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "top"), [("mxfp4", 2), ("mxfp8", 8)])
def test_a_block_of_mx_shares_the_power_of_two_of_its_largest_value(number: str, top: int) -> None:
    """OCP MX 1.0, 6.3, with Python's own frexp."""
    w = weight() * 10.0 ** torch.linspace(-20, 20, 12)[:, None]
    w[3, :32] = 0
    tensor = quantize_linear(w, method="rtn", bits=NUMBERS[number].bits or 0, group_size=32, number=number)
    assert isinstance(tensor, FloatingTensor)
    exponents = tensor.scales["scale"].int() - 127
    for i, row in enumerate(w.view(12, 4, 32).abs().amax(-1).tolist()):
        for j, peak in enumerate(row):
            assert int(exponents[i, j]) == (math.frexp(peak)[1] - 1 - top if peak else -127)
    assert torch.equal(tensor.dequantize()[3, :32], torch.zeros(32))
    scale = torch.ldexp(torch.ones(12, 4, dtype=torch.float64), exponents)[..., None]
    element = number_format(number).element
    steps = (w.double().view(12, 4, 32) / scale).clamp(-element.top, element.top)
    values = element.values()[finite_codes(element)].double()
    near = (steps[..., None] - values).abs().amin(-1)
    torch.testing.assert_close(((tensor.dequantize().double().view(12, 4, 32) / scale) - steps).abs(), near, rtol=0, atol=1e-12)


def test_nvfp4_has_two_levels_of_scales() -> None:
    w = weight() * 3
    w[0, :16] = 0
    w[1, 16:32] *= 1e-6
    tensor = quantize_linear(w, method="rtn", bits=4, group_size=16, number="nvfp4")
    assert isinstance(tensor, FloatingTensor)
    whole = w.abs().max() / (6 * 448)
    torch.testing.assert_close(tensor.scales["tensor_scale"], whole.reshape(1))
    want = (w.view(12, 8, 16).abs().amax(-1) / 6 / whole).clamp(min=2**-9).to(torch.float8_e4m3fn)
    assert torch.equal(tensor.scales["scale"], want.view(torch.uint8))
    assert torch.equal(tensor.dequantize()[0, :16], torch.zeros(16))
    assert int(tensor.scales["scale"].max()) == 0x7E


def test_double_quantized_scales_stay_close() -> None:
    """The gaps of the dynamic table near 1 are 0.9/64: half of one, of the largest distance from the mean."""
    w = weight(64, 1024) * torch.rand(64, 1, generator=torch.Generator().manual_seed(1))
    plain, double = (quantize_linear(w, method="rtn", bits=4, group_size=64, number=n) for n in ("nf4", "nf4_dq"))
    assert isinstance(plain, FloatingTensor)
    assert isinstance(double, FloatingTensor)
    exact = plain.scales["scale"]
    got = number_format("nf4_dq").read(double.scales)
    spread = (exact - exact.mean()).abs().view(-1, 256).amax(1).repeat_interleave(256).view_as(exact)
    assert bool(((got - exact).abs() <= spread * 0.9 / 64 / 2 * (1 + 1e-4)).all())
    assert double.bits_stored < plain.bits_stored


# --- stored tensors -------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    sizes = {**{n: [g] for n, g in GROUPS.items()}, "fp8_e4m3": [None, 32], "fp8_e5m2": [None, 32]}
    return [(n, g, m) for n, groups in sizes.items() for g in groups for m in ("rtn", "gptq", "smoothquant")]


@pytest.mark.parametrize(("number", "group_size", "method"), cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packing_is_exact_and_bits_are_honest(number: str, group_size: int | None, method: str, dtype: torch.dtype) -> None:
    w, x = weight(dtype=dtype), torch.randn(2, 90, 128, generator=torch.Generator().manual_seed(2))
    w[2], w[:, 5] = 0, 0
    x[..., 7] = 0
    before = w.clone()
    bits = NUMBERS[number].bits
    assert bits is not None
    tensor = quantize_linear(w, method=method, bits=bits, group_size=group_size, number=number, inputs=x)
    assert torch.equal(w, before)
    again = unpack(tensor.format, tensor.pack(), json.loads(json.dumps(tensor.meta())))
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert all(torch.equal(t, again.pack()[k]) for k, t in tensor.pack().items())
    assert tensor.bits_nominal == bits
    # Half a unit of three mantissa bits is 2^-4 of a value, that of two 2^-3; four bits leave a tenth on normal weights.
    bound = {"fp8_e4m3": 2**-4, "mxfp8": 2**-4, "fp8_e5m2": 2**-3}.get(number, 0.16) * (3 if method == "gptq" else 1)
    assert float((tensor.dequantize() - w).norm() / w.norm()) < bound
    if method == "rtn":
        granularity = Granularity.CHANNEL if group_size is None else Granularity.GROUP
        formula = bits_formula(WeightScheme(bits, True, granularity, group_size, "float32", number), (12, 128))
        assert tensor.bits_stored == pytest.approx(formula, abs=1e-12)


def test_the_published_bits_of_the_formats() -> None:
    def bits(number: str, group_size: int, scale_dtype: str = "float16") -> float:
        width = NUMBERS[number].bits or 0
        return bits_formula(WeightScheme(width, True, Granularity.GROUP, group_size, scale_dtype, number), (4096, 4096))

    assert bits("mxfp4", 32) == 4.25
    assert bits("mxfp8", 32) == 8.25
    assert bits("nvfp4", 16) == pytest.approx(4.5, abs=1e-5)
    assert bits("nf4", 64, "float32") == 4.5
    assert bits("nf4_dq", 64) == pytest.approx(4.127, abs=1e-3)  # QLoRA: 0.127 bits a weight for its scales


@pytest.mark.parametrize("scales", [256, 257])
def test_every_256_scales_have_a_constant(scales: int) -> None:
    tensor = quantize_linear(weight(scales, 64), method="rtn", bits=4, group_size=64, number="nf4_dq")
    formula = bits_formula(WeightScheme(4, True, Granularity.GROUP, 64, "float32", "nf4_dq"), (scales, 64))
    assert tensor.bits_stored == formula == pytest.approx(4 + (8 * scales + 32 * (1 + -(-scales // 256))) / (scales * 64), abs=1e-12)


@pytest.mark.parametrize("number", FORMATS)
def test_gptq_beats_rounding_and_equals_it_where_inputs_are_independent(number: str) -> None:
    w, g = weight(16, 128), torch.Generator().manual_seed(3)
    x = torch.randn(4, 200, 128, generator=g) @ torch.randn(128, 128, generator=g)
    given: dict[str, Any] = {"bits": NUMBERS[number].bits, "group_size": GROUPS.get(number), "number": number}
    rtn = quantize_linear(w, method="rtn", **given)
    for act_order in (False, True):
        gptq = quantize_linear(w, method="gptq", inputs=x, act_order=act_order, **given)
        errors = [float((x @ (t.dequantize() - w).T).square().sum()) for t in (gptq, rtn)]
        assert errors[0] < 0.8 * errors[1]
    diagonal = quantize_linear(w, method="gptq", hessian=torch.diag(torch.rand(128, generator=g) + 0.5), **given)
    assert torch.equal(diagonal.dequantize(), rtn.dequantize())


def test_float16_scales_that_do_not_fit_are_kept_in_float32() -> None:
    tensor = quantize_linear(weight() * 0.01, method="rtn", bits=8, number="fp8_e5m2", scale_dtype="float16")
    assert isinstance(tensor, FloatingTensor)
    assert tensor.scales["scale"].dtype is torch.float32
    tensor = quantize_linear(weight(), method="rtn", bits=8, number="fp8_e4m3", scale_dtype="float16")
    assert isinstance(tensor, FloatingTensor)
    assert tensor.scales["scale"].dtype is torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": "fp9"}, "weight.number=fp9 is unknown; choose one of int, fp8_e4m3"),
        ({"number": "fp8_e4m3"}, "weight.number=fp8_e4m3 has 8 bits; weight.bits=4 was given"),
        ({"number": "mxfp4"}, "mxfp4 has one scale per 32 inputs; set granularity=group, group_size=32"),
        ({"number": "nf4"}, "nf4 works in groups; set granularity=group"),
        ({"number": "nf4", "symmetric": False}, "has a sign and no zero point; set weight.symmetric=true"),
    ],
)
def test_schemes_that_cannot_be_say_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightScheme(**{"bits": 4, "symmetric": True, **change})


@pytest.mark.parametrize("method", [Rtn, Gptq])
def test_parameters_of_integer_grids_are_noted(method: Any) -> None:
    """And change nothing."""
    w, statistics = weight(), Statistics(hessian=torch.eye(128))
    fp8, integers = WeightScheme(8, True, number="fp8_e4m3"), WeightScheme(8, True)
    plain, given = method().quantize(w, statistics, fp8), method(grid="awq_asym", mse=True).quantize(w, statistics, fp8)
    assert torch.equal(given.tensor.dequantize(), plain.tensor.dequantize())
    assert plain.notes == []
    assert given.notes == ["without effect: grid=awq_asym, mse=true; weight.number=fp8_e4m3 has values and scales of its own"]
    assert not any("without effect" in n for n in method(grid="absmax", mse=True).quantize(w, statistics, integers).notes)


def test_a_method_for_integers_refuses_other_numbers() -> None:
    scheme = WeightScheme(4, True, Granularity.GROUP, 64, number="nf4")
    assert Supports().refuses("hqq", scheme) == "hqq does not make weight.number=nf4; it makes int"
    assert Supports(numbers=("any",)).refuses("rtn", scheme) is None
    with pytest.raises(ValueError, match=r"awq does not make weight\.number=nf4"):
        quantize_linear(weight(), method="awq", bits=4, group_size=64, number="nf4", inputs=weight())


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_activations_equal_casts_of_torch(number: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    cast = TORCH[number.removeprefix("fp8_")]
    top = torch.finfo(cast).max
    scale = x.float().abs().amax(-1, keepdim=True) / top
    want = ((x.float() / scale).clamp(-top, top).to(cast).float() * scale).to(dtype)
    assert torch.equal(fake_quantize_activation(x, ActivationScheme(8, number=number)), want)
    static = ActivationScheme(8, granularity=Granularity.TENSOR, dynamic=False, number=number)
    fixed = ((x.float() / (3 / top)).clamp(-top, top).to(cast).float() * (3 / top)).to(dtype)
    assert torch.equal(fake_quantize_activation(x, static, (-3.0, 2.0)), fixed)


@pytest.mark.parametrize("number", ["mxfp8", "mxfp4", "nvfp4"])
def test_block_formats_quantize_tokens_as_rows_of_weights(number: str) -> None:
    """Every token is a tensor of one row; the last block may be smaller."""
    block, bits = NUMBERS[number].block, NUMBERS[number].bits
    assert block is not None
    assert bits is not None
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 30.0])[:, None, None]
    got = fake_quantize_activation(x, ActivationScheme(bits, number=number))
    for s, t in ((0, 0), (1, 2)):
        alone = quantize_linear(x[s, t][None], method="rtn", bits=bits, group_size=block, number=number)
        assert torch.equal(got[s, t], alone.dequantize()[0])
    ragged = fake_quantize_activation(x[..., :100], ActivationScheme(bits, number=number))
    whole = torch.nn.functional.pad(x[..., :100], (0, 28))
    assert torch.equal(ragged, fake_quantize_activation(whole, ActivationScheme(bits, number=number))[..., :100])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("number", [n for n, kind in NUMBERS.items() if kind.activations])
def test_a_token_that_is_not_finite_becomes_nan_and_leaves_the_others_alone(number: str, bad: float) -> None:
    """So that a model which overflows is told by its logits: no scale serves such a token, and a NaN has no code. A fixed scale clips
    an infinity as it clips what else lies beyond it."""
    bits = NUMBERS[number].bits or 8
    scheme = ActivationScheme(bits, number=number)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    wanted = fake_quantize_activation(x, scheme)
    broken = x.clone()
    broken[1, 5] = bad
    wanted[1] = math.nan
    torch.testing.assert_close(fake_quantize_activation(broken, scheme), wanted, rtol=0, atol=0, equal_nan=True)
    if NUMBERS[number].block is None:
        static = ActivationScheme(bits, granularity=Granularity.TENSOR, dynamic=False, number=number)
        far = fake_quantize_activation(broken.nan_to_num(posinf=1e30, neginf=-1e30), static, (-3.0, 3.0))
        far[broken.isnan()] = math.nan
        torch.testing.assert_close(fake_quantize_activation(broken, static, (-3.0, 3.0)), far, rtol=0, atol=0, equal_nan=True)


def test_an_nvfp4_scale_that_float32_does_not_hold_gives_zeros() -> None:
    """1e-42 / (6 · 448) is less than half of float32's least number, 1.4e-45."""
    x = torch.zeros(2, 32)
    x[0, :16] = 1e-42
    assert not fake_quantize_activation(x, ActivationScheme(4, number="nvfp4")).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4, "number": "nf4"}, "activation.number=nf4 is for weights; choose int, fp8_e4m3"),
        ({"bits": 8, "number": "mxfp8", "granularity": Granularity.TENSOR}, "a scale per 32 inputs of a token"),
        ({"bits": 8, "outlier_threshold": 0.0}, "outlier_threshold=0.0 must be positive"),
        ({"bits": 8, "outlier_threshold": math.inf}, "outlier_threshold=inf must be positive and finite"),
        ({"bits": 8, "outlier_threshold": 6.0, "granularity": Granularity.TENSOR}, "activation.granularity token"),
    ],
)
def test_activation_schemes_that_cannot_be_say_why(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationScheme(**values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_dequantized_value(dtype: torch.dtype) -> None:
    stored = quantize_linear(weight(), method="nf4", bits=4, group_size=64)
    wanted = stored.dequantize()
    torch.set_default_dtype(dtype)
    try:
        found = stored.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32
    assert torch.equal(found, wanted)
