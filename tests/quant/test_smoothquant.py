"""SmoothQuant: function-preserving, and it does what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.activation import fake_quantize
from quant.methods.base import ScaleGroup
from quant.methods.rtn import Rtn
from quant.methods.smoothquant import SmoothQuant
from quant.scheme import WeightScheme
from quant.statistics import Statistics, collect

W8 = WeightScheme(8, symmetric=True)


def group_of(weight: Tensor, x: Tensor, producer: str = "norm") -> ScaleGroup:
    return ScaleGroup("g", producer, {"w": weight}, collect(x, frozenset({"absmax"})), lambda w, i: i @ w["w"].T)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weight, and tokens with two outlier channels."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g, dtype=dtype)
    x[:, [3, 40]] *= 60
    return torch.randn(24, 64, generator=g, dtype=dtype), x


def test_folding_the_scale_leaves_the_function_unchanged() -> None:
    w, x = data(torch.float64)
    s = SmoothQuant().scale(group_of(w, x), W8)
    assert s is not None
    torch.testing.assert_close((x / s) @ (w * s).T, x @ w.T, rtol=1e-10, atol=1e-10)


def test_at_one_half_weights_and_activations_get_equal_peaks() -> None:
    w, x = data()
    s = SmoothQuant(alpha=0.5).scale(group_of(w, x), W8)
    assert s is not None
    torch.testing.assert_close((x / s).abs().amax(0), (w * s).abs().amax(0))


def test_outliers_cost_less_after_smoothing() -> None:
    w, x = data()

    def error(s: Tensor) -> float:
        q = Rtn(grid="absmax").quantize(w * s, Statistics(), W8).tensor.dequantize()
        return float((fake_quantize(x / s, 8, symmetric=True) @ q.T - x @ w.T).norm())

    s = SmoothQuant().scale(group_of(w, x), W8)
    assert s is not None
    assert error(s) < 0.5 * error(torch.ones(64))


def test_the_widest_consumer_counts() -> None:
    w, x = data()
    both = ScaleGroup("g", "norm", {"a": w, "b": 3 * w}, collect(x, frozenset({"absmax"})), lambda weights, i: i)
    one = SmoothQuant().scale(group_of(3 * w, x), W8)
    assert one is not None
    torch.testing.assert_close(SmoothQuant().scale(both, W8), one)


@pytest.mark.parametrize("producer", ["linear", "none"])
def test_inputs_that_come_from_no_norm_are_left_alone(producer: str) -> None:
    w, x = data()
    assert SmoothQuant().scale(group_of(w, x, producer), W8) is None


def test_inputs_that_never_fire_get_the_floor() -> None:
    w, x = data()
    x[:, 7] = 0
    s = SmoothQuant().scale(group_of(w, x), W8)
    assert s is not None
    assert float(s[7]) == pytest.approx(1e-5)


def test_alpha_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha=1\.5 is not .* from 0 to 1"):
        SmoothQuant(alpha=1.5)


def test_statistics_of_scaled_inputs_are_exact() -> None:
    _, x = data(torch.float64)
    kinds = frozenset({"hessian", "absmax", "absmean", "samples"})
    s = torch.linspace(0.1, 4, 64)
    mapped, recollected = collect(x, kinds).scaled(s), collect(x / s, kinds)
    for kind in kinds:
        torch.testing.assert_close(getattr(mapped, kind), getattr(recollected, kind), rtol=1e-4, atol=1e-4, check_dtype=False)
