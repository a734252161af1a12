"""Values that the reference implementations themselves gave on the golden inputs.

Min-max grids: 1e-4 relative. The column solver may flip a few roundings between BLAS builds: 1 % on the output error and on the sum,
0.2 % on the relative error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant import quantize_linear
from quant.activation import fake_quantize
from quant.binary import binarize
from quant.methods.base import ScaleGroup
from quant.methods.smoothquant import SmoothQuant
from quant.scheme import WeightScheme
from quant.statistics import collect
from quant.tensors.mixed import MixedTensor
from tests.quant.golden_inputs import inputs, output_error, relative_error, weight

RTN = [
    ({"bits": 2}, 0.734908, 1281688, -96.416, (0, 0, 0, 3.53803)),
    ({"bits": 3}, 0.369344, 316323.9, -94.393, (1.5163, 0, 1.5163, 1.5163)),
    ({"bits": 4}, 0.173171, 71924.3, -158.082, (1.41521, 0.70761, 0.70761, 2.12282)),
    ({"bits": 3, "mse": True}, 0.291737, 208607.7, -130.377, (2.12282, 0, 1.06141, 2.12282)),
    ({"bits": 2, "grid": "awq_asym", "group_size": 128}, 0.645254, 971976, -139.628, None),
    ({"bits": 3, "grid": "awq_asym", "group_size": 128}, 0.305410, 221488.6, -146.523, (1.5163, 0, 1.5163, 1.5163)),
    ({"bits": 4, "grid": "awq_asym", "group_size": 128}, 0.143761, 50034.5, -157.867, None),
    ({"bits": 3, "grid": "awq_asym", "group_size": 64}, 0.243912, 138055.5, -148.192, (1.29926, 0, 1.29926, 2.59852)),
    ({"bits": 3, "grid": "omni", "group_size": 64}, 0.243912, 138055.5, -148.192, (1.29926, 0, 1.29926, 2.59852)),
    ({"bits": 3, "grid": "q_sym"}, 0.544733, 700578.0, -102.029, None),
    ({"bits": 3, "grid": "q_sym", "mse": True}, 0.326859, 258505.0, -114.587, (2.22953, 0, 1.11476, 2.22953)),
    ({"bits": 4, "grid": "q_sym"}, 0.241599, 140827.9, -130.341, None),
    ({"bits": 4, "grid": "q_sym", "mse": True}, 0.196594, 91993.5, -144.235, (2.04752, 0.68251, 0.68251, 2.04752)),
    ({"bits": 2, "grid": "hqq", "group_size": 64}, 0.573712, 775387, -192.130, None),
]
GPTQ = [
    ({"bits": 2}, 0.956300, 1081250, -23.483, (0, 0, 0, 3.53803)),
    ({"bits": 3}, 0.490738, 244739.9, -156.255, (1.5163, 0, 1.5163, 1.5163)),
    ({"bits": 3, "block_size": 256}, 0.490738, 244739.9, -156.255, (1.5163, 0, 1.5163, 1.5163)),
    ({"bits": 3, "group_size": 64}, 0.325845, 104967.1, -118.233, (1.29926, 0, 1.29926, 2.59852)),
    ({"bits": 3, "group_size": 64, "block_size": 256}, 0.323876, 104193.8, -111.004, (1.29926, 0, 1.29926, 2.59852)),
    ({"bits": 3, "act_order": True}, 0.562843, 213215.9, -158.853, (1.5163, 0, 0, 1.5163)),
    ({"bits": 3, "group_size": 64, "act_order": True}, 0.393570, 104711.6, -133.402, (0, 0.57144, 0, 1.5163)),
]
PB_LLM = [
    (0.5, 0.184768, 49464.0, -147.780, None),
    (0.8, 0.342615, 183087.9, -104.425, None),
    (0.9, 0.430948, 291255.7, -127.240, (1.7482, 0.56831, 0.56831, 2.20607)),
]
BINARIZED = [(1, 0.671343, 1139136, -119.114, None), (2, 0.479912, 606777, -91.036, (1.40024, 0.31598, 1.40024, 1.40024))]


def _name(value: object) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""


def test_golden_inputs_are_the_published_ones() -> None:
    assert float(weight().double().sum()) == pytest.approx(-140.31305, abs=1e-4)
    assert float(weight().double().norm()) == pytest.approx(89.76040, abs=1e-4)
    assert inputs()[0, 0, :4].tolist() == pytest.approx([0.406086, -0.542239, -0.276090, -1.243669], abs=1e-6)


@pytest.mark.parametrize(("params", "rel", "out", "total", "first"), RTN, ids=_name)
def test_rtn_equals_the_reference_code(params: dict[str, Any], rel: float, out: float, total: float, first: Any) -> None:
    q = quantize_linear(weight(), method="rtn", **params).dequantize()
    assert relative_error(q) == pytest.approx(rel, rel=1e-4)
    assert output_error(q) == pytest.approx(out, rel=1e-4)
    assert float(q.double().sum()) == pytest.approx(total, rel=1e-4)
    if first is not None:
        assert q[0, :4].tolist() == pytest.approx(first, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("params", "rel", "out", "total", "first"), GPTQ, ids=_name)
def test_gptq_equals_the_reference_code(params: dict[str, Any], rel: float, out: float, total: float, first: tuple[float, ...]) -> None:
    q = quantize_linear(weight(), method="gptq", inputs=inputs(), **params).dequantize()
    assert relative_error(q) == pytest.approx(rel, rel=2e-3)
    assert output_error(q) == pytest.approx(out, rel=1e-2)
    assert float(q.double().sum()) == pytest.approx(total, rel=1e-2)
    assert q[0, :4].tolist() == pytest.approx(first, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("fraction", "rel", "out", "total", "first"), PB_LLM)
def test_pb_llm_equals_the_reference_code(fraction: float, rel: float, out: float, total: float, first: Any) -> None:
    q = quantize_linear(weight(), method="pb_llm", bits=1, inputs=inputs(), low_fraction=fraction).dequantize()
    assert relative_error(q) == pytest.approx(rel, rel=2e-3)
    assert output_error(q) == pytest.approx(out, rel=1e-2)
    assert float(q.double().sum()) == pytest.approx(total, rel=1e-2)
    if first is not None:
        assert q[0, :4].tolist() == pytest.approx(first, rel=1e-4)


def test_billm_equals_the_reference_code() -> None:
    q = quantize_linear(weight(), method="billm", bits=1, inputs=inputs(), metric="magnitude").dequantize()
    assert relative_error(q) == pytest.approx(0.367785, rel=2e-3)
    assert output_error(q) == pytest.approx(209805.3, rel=1e-2)
    assert float(q.double().sum()) == pytest.approx(-256.587, rel=1e-2)
    assert q[0, :4].tolist() == pytest.approx((1.82217, 0.42662, 1.82217, 1.82217), rel=1e-4)


@pytest.mark.parametrize(("order", "rel", "out", "total", "first"), BINARIZED)
def test_the_binarizer_equals_the_reference_code(order: int, rel: float, out: float, total: float, first: Any) -> None:
    q = binarize(weight(), torch.ones(256, dtype=torch.bool), order).value
    assert relative_error(q) == pytest.approx(rel, rel=1e-4)
    assert output_error(q) == pytest.approx(out, rel=1e-4)
    assert float(q.double().sum()) == pytest.approx(total, rel=1e-4)
    if first is not None:
        assert q[0, :4].tolist() == pytest.approx(first, rel=1e-4)


def test_slim_llm_equals_the_reference_code() -> None:
    tensor = quantize_linear(weight(), method="slim_llm", bits=2, group_size=32, inputs=inputs())
    assert isinstance(tensor, MixedTensor)
    assert tensor.widths == (1, 2, 2, 2, 2, 3, 2, 2)
    q = tensor.dequantize()
    assert relative_error(q) == pytest.approx(0.616086, rel=2e-3)
    assert output_error(q) == pytest.approx(331462.4, rel=1e-2)
    assert float(q.double().sum()) == pytest.approx(-74.448, rel=1e-2)
    assert q[0, :4].tolist() == pytest.approx([1.31541] * 4, rel=1e-4)


@pytest.mark.parametrize(("symmetric", "clip", "rel"), [(True, 1.0, 0.158524), (True, 0.9, 0.144122), (False, 1.0, 0.134019)])
def test_four_bit_activations_per_token_equal_the_reference_code(symmetric: bool, clip: float, rel: float) -> None:
    x = inputs().reshape(-1, 256)
    q = fake_quantize(x, 4, symmetric, clip)
    assert float((q - x).norm() / x.norm()) == pytest.approx(rel, rel=1e-4)


def test_smoothquant_scales_and_w8a8_error_equal_the_reference_code() -> None:
    w, x = weight(), inputs()
    group = ScaleGroup("norm", "norm", {"a": w, "b": w}, collect(x, frozenset({"absmax"})), lambda weights, x: x)
    s = SmoothQuant(alpha=0.5).scale(group, WeightScheme(8, symmetric=True))
    assert s is not None
    assert s[:4].tolist() == pytest.approx([0.605580, 1.095168, 0.969717, 1.213309], rel=1e-5)
    assert (float(s.min()), float(s.max())) == pytest.approx((0.408467, 1.664395), rel=1e-5)

    q = quantize_linear(w, method="rtn", bits=8, grid="absmax").dequantize()
    full, rounded = x[0] @ w.T, fake_quantize(x[0], 8, symmetric=True) @ q.T
    assert float((rounded - full).norm() / full.norm()) == pytest.approx(0.015311, rel=1e-4)
