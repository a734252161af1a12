"""LLM.int8() and NF4: the rules by slow loops, the outliers they win back, and the package they come from as an oracle."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.activation import fake_quantize_activation
from quant.number_formats import DYNAMIC, NF4
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.floating import FloatingTensor
from tests.quant.outliers import A8, PLANTED, layer, loss

MIXED = ActivationScheme(8, outlier_threshold=6.0)
installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'bitgrid[bitsandbytes]'"
)


def decomposed(x: Tensor, threshold: float) -> Tensor:
    """Reference, value by value, of one sequence `[T, K]`."""
    tokens, k = x.shape
    kept = [any(abs(float(x[t, j])) >= threshold for t in range(tokens)) for j in range(k)]
    out = x.clone()
    for t in range(tokens):
        peak = max((abs(float(v)) for v in x[t] if abs(float(v)) < threshold), default=0.0)
        scale = max(peak, 1e-5) / 127
        for j in range(k):
            if not kept[j]:
                out[t, j] = round(float(x[t, j]) / scale) * scale
    return out


def test_outlier_inputs_stay_and_the_others_are_rounded_without_them() -> None:
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    x[0, 3, 5], x[1, :, 2], x[1, 0, 0] = -8.0, 7.0, 6.0
    got = fake_quantize_activation(x, MIXED)
    for s in range(2):
        torch.testing.assert_close(got[s], decomposed(x[s], 6.0), rtol=1e-5, atol=1e-6)
        assert torch.equal(fake_quantize_activation(x[s], MIXED), got[s])  # a batch equals its sequences
    assert torch.equal(got[0, :, 5], x[0, :, 5])
    assert not torch.equal(got[1, :, 5], x[1, :, 5])
    assert torch.equal(got[1][:, [0, 2]], x[1][:, [0, 2]])


def test_without_outliers_it_is_plain_rounding() -> None:
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
    assert torch.equal(fake_quantize_activation(x, MIXED), fake_quantize_activation(x, A8))


def test_decomposition_wins_back_what_planted_outliers_cost() -> None:
    """Measured: 84 % of the loss of W8A8 rounding to nearest. What is left is the int8 weights' own error on the wide inputs."""
    w, x = layer()
    rounded = quantize_linear(w, method="llm_int8", bits=8).dequantize()
    assert loss(w, x, rounded, MIXED) < 0.25 * loss(w, x, rounded, A8)
    weights_alone = float((x @ (rounded - w).T).square().sum())
    assert loss(w, x, rounded, MIXED) < 1.1 * weights_alone


def test_rows_of_zeros_and_scales_that_float16_cannot_hold_work() -> None:
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[2] *= 1e-9
    tensor = quantize_linear(w, method="llm_int8", bits=8, scale_dtype="float16")
    assert torch.equal(tensor.dequantize()[1], torch.zeros(16))
    assert float((tensor.dequantize() - w)[2].norm() / w[2].norm()) < 0.01
    assert tensor.bits_stored == 8 + 32 / 16


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "llm_int8", "bits": 4}, "llm_int8 does not make weight.bits=4; it makes 8"),
        ({"method": "llm_int8", "bits": 8, "group_size": 8}, "llm_int8 does not work with weight.granularity=group"),
        ({"method": "nf4", "bits": 4}, "nf4 works in groups"),
        ({"method": "nf4", "bits": 4, "group_size": 8, "number": "int"}, "nf4 does not make weight.number=int; it makes nf4, nf4_dq"),
        ({"method": "llm_int8", "bits": 8, "backend": "cuda"}, "backend='cuda' is not .* one of native, bitsandbytes"),
    ],
)
def test_what_they_cannot_make_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_linear(torch.ones(4, 16), **params)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"pip install 'bitgrid\[bitsandbytes\]'"):
        quantize_linear(torch.ones(4, 16), method="llm_int8", bits=8, backend="bitsandbytes")


# --- the original -----------------------------------------------------------------------------------------------------


def matrix(n: int = 64, k: int = 512) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * torch.rand(n, 1, generator=torch.Generator().manual_seed(2))


@installed
def test_codes_of_bitsandbytes_int8_equal_ours() -> None:
    ours, theirs = (quantize_linear(matrix(), method="llm_int8", bits=8, backend=b) for b in ("native", "bitsandbytes"))
    assert isinstance(ours, AffineTensor)
    assert isinstance(theirs, AffineTensor)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scale, theirs.scale)


@installed
def test_codes_of_bitsandbytes_nf4_equal_ours() -> None:
    given: dict[str, Any] = {"method": "nf4", "bits": 4, "group_size": 64}
    ours, theirs = (quantize_linear(matrix(), backend=b, **given) for b in ("native", "bitsandbytes"))
    assert isinstance(ours, FloatingTensor)
    assert isinstance(theirs, FloatingTensor)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales["scale"], theirs.scales["scale"])


@installed
def test_tables_and_double_quantization_of_bitsandbytes_equal_ours() -> None:
    """Its tables were made in float32: two units of the last place below 1."""
    import bitsandbytes.functional as original

    w = matrix()
    _, state = original.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(NF4.values(), state.code, rtol=0, atol=2**-23)
    torch.testing.assert_close(DYNAMIC.values(), state.state2.code, rtol=0, atol=2**-23)
    ours = quantize_linear(w, method="nf4", bits=4, group_size=64, number="nf4_dq")
    assert isinstance(ours, FloatingTensor)
    assert torch.equal(ours.scales["scale"].reshape(-1), state.absmax)
    torch.testing.assert_close(ours.scales["scale_scale"], state.state2.absmax)
    torch.testing.assert_close(ours.scales["scale_offset"][0], state.offset)


@installed
def test_outliers_of_bitsandbytes_are_ours() -> None:
    """One sequence, in float32: codes, scales and outlier columns of its own row-wise quantization."""
    import bitsandbytes.functional as original

    x = layer()[1][0]
    codes, peak, columns = original.int8_vectorwise_quant(x.clone(), threshold=6.0)
    assert columns.tolist() == PLANTED
    want = codes * (peak / 127)[:, None]
    want[:, columns] = x[:, columns]
    torch.testing.assert_close(fake_quantize_activation(x, MIXED), want, rtol=1e-5, atol=1e-6)
