"""Quantization with gradients: values of the plain code to the last bit, gradients of the function with rounding held fixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.activation import fake_quantize_activation
from quant.grids import GRIDS, affine_of
from quant.scheme import ActivationScheme, Granularity
from quant.straight_through import activation_through, affine_through, round_through, scaled_limits, through


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=g, dtype=dtype) * torch.logspace(-3, 3, shape[-1], dtype=dtype)


def test_a_rounded_number_is_exact() -> None:
    """Near halves, tiny and large: where a sum with the difference could be off by a bit."""
    x = torch.cat([torch.linspace(-9, 9, 100_001), torch.tensor([0.5, 1.5, -0.5, 1e-30, 8388607.5, 0.49999997])])
    assert torch.equal(through(x, x.round()), x.round())
    assert torch.equal(through(x, x.half().float()), x.half().float())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_are_those_of_the_plain_code(name: str, dtype: torch.dtype) -> None:
    g, w = GRIDS[name], values(7, 2, 32).clamp(-40, 40)
    w[0], w[1] = torch.arange(32) % 15 / 2 - 1, 3.0  # halves of a step of 1, above a zero of 1; ranges without a width
    low, high = g.limits(w)
    plain, soft = affine_of(g, low, high, 3, dtype), affine_through(g, low, high, 3, dtype)
    assert torch.equal(plain.scale, soft.scale)
    assert torch.equal(plain.zero, soft.zero)
    for x in (w, 2 * w):  # within the range, and beyond it
        assert torch.equal(plain.round(x), round_through(soft, x))
    # An even number of steps: halves go the same way.
    assert torch.equal(plain.decode((plain.encode(w) + 2).clamp(max=plain.top)), round_through(soft, w, 2.0))


@pytest.mark.parametrize(
    "scheme",
    [
        *(ActivationScheme(4, s, g) for s in (False, True) for g in (Granularity.TOKEN, Granularity.TENSOR)),
        ActivationScheme(4, clip=0.9),
        ActivationScheme(8, number="fp8_e4m3"),
        ActivationScheme(4, number="mxfp4"),
        ActivationScheme(8, outlier_threshold=6.0),
    ],
    ids=str,
)
def test_activations_are_those_of_the_plain_code(scheme: ActivationScheme) -> None:
    x = values(2, 5, 24)
    for given in (x, x[:, 0], x[0, :0]):
        assert torch.equal(activation_through(given, scheme), fake_quantize_activation(given, scheme))
    y = x.clone().requires_grad_(True)
    activation_through(y, scheme).sum().backward()
    assert y.grad is not None
    assert bool(y.grad.any())


def test_whole_limits_are_the_grids_own() -> None:
    w = values(7, 2, 32)
    for g in GRIDS.values():
        assert all(torch.equal(a, b) for a, b in zip(scaled_limits(g, w, 1.0, 1.0), g.limits(w), strict=True))


def test_gradients_of_activations_against_finite_differences() -> None:
    """Asymmetric, per token: y = (x/s + r + z) s with the residuals of both roundings held at their values."""
    x0 = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheme = ActivationScheme(3, symmetric=False)
    weights = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        s = (high - low) / 7
        return s, x / s, -low / s

    _, steps0, ratio0 = parts(x0)
    r, z = steps0.round() - steps0, ratio0.round() - ratio0
    inside = (steps0.round() + ratio0.round() >= 0) & (steps0.round() + ratio0.round() <= 7)
    codes0 = (steps0.round() + ratio0.round()).clamp(0, 7)

    def frozen(x: Tensor) -> float:
        s, steps, ratio = parts(x)
        zero = ratio + z
        return float((weights * (torch.where(inside, steps + r + zero, codes0) - zero) * s).sum())

    x = x0.clone().requires_grad_(True)
    (weights * activation_through(x, scheme)).sum().backward()
    h = 1e-6
    for i in range(3):
        for j in range(8):
            e = torch.zeros_like(x0)
            e[i, j] = h
            assert float(x.grad[i, j]) == pytest.approx((frozen(x0 + e) - frozen(x0 - e)) / (2 * h), rel=1e-6, abs=1e-8)  # type: ignore[index]
