"""What every method holds to, whatever it does: stored bytes, exact packing, determinism, types, and awkward weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.methods.base import StoredTensor
from quant.methods.registry import METHODS, ROUNDERS, TUNERS
from quant.tensors import unpack
from tests.quick import QUICK

N, K, GROUP = 24, 64, 16


def arguments(method: str) -> dict[str, Any]:
    """Four bits where the method makes them, else the most it makes; groups where it needs them; short searches."""
    rounding = METHODS[method].rounding
    supports = ROUNDERS[rounding].supports
    bits = 4 if 4 in supports.bits else max(supports.bits)
    group = None if "channel" in supports.granularity else GROUP
    return {"method": method, "bits": bits, "group_size": group, **(QUICK.get(rounding, {}) if rounding in TUNERS else {})}


def data(n: int = N, k: int = K, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights with a few large ones; inputs of 4 sequences with correlated channels of different size."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    w[:, k // 3] *= 4
    x = torch.randn(4, 48, k, generator=g) @ (torch.eye(k) + 0.2 * torch.randn(k, k, generator=g) / k**0.5)
    return w, x * torch.linspace(0.3, 3.0, k)


def quantized(method: str, w: Tensor, x: Tensor, **more: Any) -> StoredTensor:
    return quantize_linear(w, inputs=x, **{**arguments(method), **more})


def payload_equal(a: StoredTensor, b: StoredTensor) -> bool:
    one, other = a.pack(), b.pack()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) and one[k].dtype is other[k].dtype for k in one)


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_weight_is_untouched_and_the_result_is_deterministic(method: str) -> None:
    w, x = data()
    before, inputs = w.clone(), x.clone()
    first = quantized(method, w, x, seed=3)
    torch.manual_seed(99)
    assert payload_equal(first, quantized(method, w, x, seed=3))
    assert torch.equal(w, before)
    assert torch.equal(x, inputs)


def test_codes_are_in_range(method: str) -> None:
    stored: Any = quantized(method, *data())
    if stored.format in ("binary", "lattice"):
        return  # signs; indices of a codebook of its own
    codes = (stored.rest if stored.format == "columns" else stored).codes
    bits = arguments(method)["bits"]
    assert 0 <= int(codes.min())
    assert int(codes.max()) < 2 ** {"mixed": bits + 1, "partially_binary": 8}.get(stored.format, bits)


def test_one_group_for_all_inputs_is_one_for_every_row(method: str) -> None:
    supports = ROUNDERS[METHODS[method].rounding].supports
    if "group" not in supports.granularity:
        with pytest.raises(ValueError, match="group"):
            quantized(method, *data(), group_size=K)
        return
    stored = quantized(method, *data(), group_size=K)
    assert stored.shape == (N, K)
    if "channel" in supports.granularity:
        assert stored.bits_stored == quantized(method, *data(), group_size=None).bits_stored


def test_a_group_size_that_does_not_divide_is_refused_or_padded_as_the_method_says(method: str) -> None:
    """172 = 128 + 44 inputs. QuIP has groups only without its random transforms, else one grid for the whole matrix."""
    more = {"incoherence": False} if method == "quip" else {}
    supports = ROUNDERS[METHODS[method].rounding].supports
    w, x = data(k=172)
    if "group" not in supports.granularity:
        return  # refused above
    if not supports.ragged_groups:
        with pytest.raises(ValueError, match="group_size=128 does not divide in_features=172"):
            quantized(method, w, x, group_size=128, **more)
        return
    stored = quantized(method, w, x, group_size=128)
    assert stored.shape == w.shape
    assert torch.isfinite(stored.dequantize()).all()
    assert torch.equal(unpack(stored.format, stored.pack(), stored.meta()).dequantize(), stored.dequantize())


def test_pack_and_unpack_are_exact_inverses(method: str) -> None:
    stored = quantized(method, *data())
    meta = json.loads(json.dumps(stored.meta()))
    again = unpack(stored.format, stored.pack(), meta)
    assert payload_equal(stored, again)
    assert again.meta() == stored.meta()
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert (again.bits_nominal, again.bits_stored, again.shape) == (stored.bits_nominal, stored.bits_stored, (N, K))


def test_stored_bits_are_the_bytes_of_the_payload(method: str) -> None:
    stored = quantized(method, *data())
    assert stored.bits_stored == pytest.approx(8 * sum(t.numel() * t.element_size() for t in stored.pack().values()) / (N * K))
    assert stored.bits_nominal <= stored.bits_stored + 1e-9
    if METHODS[method].transforms:
        return  # it has an input scale already
    scaled = stored.with_input_scale(torch.linspace(0.5, 2.0, K))
    assert torch.allclose(scaled.dequantize(), stored.dequantize() / torch.linspace(0.5, 2.0, K), rtol=1e-6)
    twice = scaled.with_input_scale(torch.full((K,), 3.0))
    assert torch.allclose(twice.dequantize(), scaled.dequantize() / 3, rtol=1e-6)


def test_it_approximates_the_weight(method: str) -> None:
    w, x = data()
    q = quantized(method, w, x).dequantize()
    assert q.dtype is torch.float32
    assert q.shape == w.shape
    # Worse than setting every weight to 0 is no approximation of the output.
    flat = x.reshape(-1, K)
    assert float((flat @ (q - w).T).norm() / (flat @ w.T).norm()) < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_float_types_work(method: str, dtype: torch.dtype) -> None:
    w, x = data()
    given = w.to(dtype)
    before = given.clone()
    stored = quantized(method, given, x)
    assert torch.equal(given, before)
    assert torch.isfinite(stored.dequantize()).all()
    # Half types hold exactly what float32 then computes with.
    if dtype is not torch.float64:
        assert payload_equal(stored, quantized(method, given.float(), x))


AWKWARD = {
    "zeros": lambda w, x: (torch.zeros_like(w), x),
    "equal groups": lambda w, x: (torch.full_like(w, 0.37), x),
    "a zero row": lambda w, x: (w.index_fill(0, torch.tensor([2]), 0.0), x),
    "dead columns": lambda w, x: (w, x.index_fill(2, torch.tensor([0, 17, 40]), 0.0)),
    "one row": lambda w, x: (w[:1], x),
    "singular hessian": lambda w, x: (w, x[:1, :3]),
    "a huge weight": lambda w, x: (w.index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(3e4)), x),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_weights_and_inputs_are_answered(method: str, case: str) -> None:
    """A finite weight of the right shape that survives packing."""
    w, x = AWKWARD[case](*data())
    stored = quantized(method, w, x)
    q = stored.dequantize()
    assert q.shape == w.shape
    assert torch.isfinite(q).all()
    assert torch.equal(unpack(stored.format, stored.pack(), stored.meta()).dequantize(), q)
    if case == "zeros":
        assert not q.any()
    if case == "equal groups":
        # In the norm: methods that mix the entries of the matrix spread their error.
        assert float((q - w).norm()) <= 0.5 * float(w.norm())
