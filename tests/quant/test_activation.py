"""Fake quantization of activations, keys and values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.activation import fake_quantize_activation, fake_quantize_kv
from quant.scheme import ActivationScheme, Granularity, KVScheme

TENSOR = Granularity.TENSOR


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_errors_stay_within_the_tokens_own_step(bits: int, symmetric: bool, seed: int) -> None:
    x = tokens(2, 5, 16, seed=seed)
    x[0, 0] *= 100
    q = fake_quantize_activation(x, ActivationScheme(bits, symmetric))
    top = x.abs().amax(-1) / (2 ** (bits - 1) - 1) if symmetric else (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    # An integer zero moves an asymmetric grid by up to half a step at its ends.
    assert torch.all((q - x).abs() <= (0.5001 if symmetric else 1.0001) * top[..., None])


def test_a_token_does_not_depend_on_the_others() -> None:
    x = tokens(2, 5, 16)
    scheme = ActivationScheme(8)
    assert torch.equal(fake_quantize_activation(x, scheme)[1, 3:4], fake_quantize_activation(x[1, 3:4], scheme))


def test_dynamic_tensor_ranges_are_per_sequence_so_that_batching_does_not_matter() -> None:
    x = tokens(3, 5, 16)
    x[0] *= 50
    scheme = ActivationScheme(4, granularity=TENSOR)
    together = fake_quantize_activation(x, scheme)
    assert torch.equal(together[1:2], fake_quantize_activation(x[1:2], scheme))
    assert torch.equal(together[1], fake_quantize_activation(x[1], scheme))
    assert together[1].unique().numel() <= 16


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_clip_what_lies_outside(symmetric: bool) -> None:
    scheme = ActivationScheme(8, symmetric, TENSOR, dynamic=False)
    x = tokens(4, 16)
    low, high = float(x.min()), float(x.max())
    seen = fake_quantize_activation(x, scheme, (low, high))
    assert torch.equal(seen, fake_quantize_activation(x, ActivationScheme(8, symmetric, TENSOR)))
    beyond = fake_quantize_activation(10 * x, scheme, (low, high))
    assert float(beyond.abs().max()) <= 1.01 * max(-low, high)


def test_static_and_dynamic_are_not_mixed_up() -> None:
    x = tokens(4, 16)
    with pytest.raises(ValueError, match="needs calibrated limits"):
        fake_quantize_activation(x, ActivationScheme(8, granularity=TENSOR, dynamic=False))
    with pytest.raises(ValueError, match="limits were given"):
        fake_quantize_activation(x, ActivationScheme(8), (-1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_type_is_kept_and_the_input_unchanged(dtype: torch.dtype) -> None:
    x = tokens(4, 16).to(dtype)
    before = x.clone()
    assert fake_quantize_activation(x, ActivationScheme(8)).dtype is dtype
    assert fake_quantize_kv(x.view(1, 1, 4, 16), KVScheme(4)).dtype is dtype
    assert torch.equal(x, before)


def test_empty_inputs_pass_through() -> None:
    for scheme in (ActivationScheme(8), ActivationScheme(8, granularity=TENSOR), ActivationScheme(8, outlier_threshold=6.0)):
        assert fake_quantize_activation(torch.zeros(0, 16), scheme).shape == (0, 16)
    assert fake_quantize_kv(torch.zeros(1, 2, 0, 16), KVScheme(8)).shape == (1, 2, 0, 16)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_kv_groups_stand_alone(group: int | None, symmetric: bool) -> None:
    x = tokens(2, 3, 5, 16)
    scheme = KVScheme(4, symmetric, group)
    q = fake_quantize_kv(x, scheme)
    width = group or 16
    alone = fake_quantize_kv(x[1:, 2:, 4:, -width:], scheme)
    assert torch.equal(q[1, 2, 4, -width:], alone[0, 0, 0])
    assert q[0, 0, 0, :width].unique().numel() <= 16


def test_smaller_kv_groups_err_less() -> None:
    x = tokens(2, 3, 50, 64)
    errors = [float((fake_quantize_kv(x, KVScheme(3, group_size=g)) - x).norm()) for g in (None, 32, 8)]
    assert errors[0] > errors[1] > errors[2]


def test_a_kv_group_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"kv\.group_size=64 does not divide head_dim=16"):
        fake_quantize_kv(tokens(1, 1, 2, 16), KVScheme(4, group_size=64))
