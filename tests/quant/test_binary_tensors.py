"""The stored formats of binarized weights: exact packing, honest bits."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import quantize_linear
from quant.methods.base import StoredTensor
from quant.tensors import unpack
from quant.tensors.binary import BinaryTensor, decode
from quant.tensors.binary import bits_formula as binary_formula
from quant.tensors.partially_binary import PartiallyBinaryTensor
from quant.tensors.partially_binary import bits_formula as partial_formula

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def bits(n: int, k: int, share: float, g: torch.Generator) -> Tensor:
    return torch.rand(n, k, generator=g) < share


def binary(n: int, k: int, block: int, salient: float, means: bool, dtype: str, seed: int) -> BinaryTensor:
    g = torch.Generator().manual_seed(seed)
    columns = bits(1, k, salient, g)[0]
    blocks = -(-k // block)
    scale = torch.rand(n, blocks, 4, generator=g).to(DTYPES[dtype])
    mean = torch.randn(n, blocks, 3, generator=g).to(DTYPES[dtype]) if means else None
    flags = (bits(n, k, 0.5, g), bits(n, k, 0.5, g) & columns, bits(n, k, 0.3, g) & ~columns)
    return BinaryTensor(*flags, columns, scale, mean, block)


def partially(n: int, k: int, group: int, high: float, high_bits: int, dtype: str, seed: int) -> PartiallyBinaryTensor:
    g = torch.Generator().manual_seed(seed)
    mask = bits(n, k, high, g)
    codes = torch.where(mask, torch.randint(0, 2**high_bits, (n, k), generator=g), bits(n, k, 0.5, g).long()).to(torch.uint8)
    scales = [torch.rand(n, c, generator=g).to(DTYPES[dtype]) for c in (1, -(-k // group), -(-k // group))]
    zero = torch.randint(0, 2**high_bits, (n, 1), generator=g).to(torch.uint8)
    return PartiallyBinaryTensor(codes, mask, scales[0], zero, scales[1], scales[2], high_bits, group, 1 - high)


def check(tensor: StoredTensor) -> None:
    payload = tensor.pack()
    again = unpack(tensor.format, payload, json.loads(json.dumps(tensor.meta())))
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert again.dequantize().dtype is torch.float32
    packed = again.pack()
    assert packed.keys() == payload.keys()
    assert all(torch.equal(packed[k], payload[k]) for k in packed)
    assert again.bits_nominal == tensor.bits_nominal
    n, k = tensor.shape
    assert tensor.bits_stored == 8 * sum(len(t.numpy().tobytes()) for t in payload.values()) / (n * k)


SIZES = {"n": st.integers(1, 6), "k": st.integers(1, 40), "width": st.integers(1, 17), "seed": st.integers(0, 99)}
SHARE = st.sampled_from([0.0, 0.2, 0.7, 1.0])


@settings(max_examples=30, deadline=None)
@given(**SIZES, share=SHARE, means=st.booleans(), dtype=st.sampled_from(list(DTYPES)))
def test_binary_packs_exactly(n: int, k: int, width: int, seed: int, share: float, means: bool, dtype: str) -> None:
    tensor = binary(n, k, width, share, means, dtype, seed)
    check(tensor)
    check(tensor.with_input_scale(torch.rand(k) + 0.5))
    formula = binary_formula((n, k), width, dtype, means=means)
    assert 0 <= (tensor.bits_stored - formula) * n * k < 8 * len(tensor.pack())
    assert tensor.bits_nominal == pytest.approx(1 + int(tensor.salient.sum()) / k)


@settings(max_examples=30, deadline=None)
@given(**SIZES, share=SHARE, high_bits=st.integers(2, 8), dtype=st.sampled_from(list(DTYPES)))
def test_partially_binary_packs_exactly(n: int, k: int, width: int, seed: int, share: float, high_bits: int, dtype: str) -> None:
    tensor = partially(n, k, width, share, high_bits, dtype, seed)
    check(tensor)
    check(tensor.with_input_scale(torch.rand(k) + 0.5))
    low = float((~tensor.mask).double().mean())
    formula = partial_formula((n, k), low, high_bits, width, dtype)
    assert -1e-6 <= (tensor.bits_stored - formula) * n * k < 8 * len(tensor.pack())


def test_values_are_signs_times_scales_plus_means() -> None:
    tensor = binary(3, 11, 4, 0.4, True, "float32", 0)
    q = tensor.dequantize()
    assert tensor.mean is not None
    for i in range(3):
        for j in range(11):
            low, high, salient, second = tensor.scale[i, j // 4].tolist()
            sign, other = (1 if t[i, j] else -1 for t in (tensor.signs, tensor.second))
            part = 2 if tensor.salient[j] else int(tensor.split[i, j])
            value = sign * (low, high, salient)[part] + (other * second if tensor.salient[j] else 0)
            assert float(q[i, j]) == pytest.approx(value + float(tensor.mean[i, j // 4, part]), abs=1e-6)
    one = decode(tensor.signs[:, :4], tensor.second[:, :4], tensor.split[:, :4], tensor.salient[:4], tensor.scale[:, 0], tensor.mean[:, 0])
    assert torch.equal(one, q[:, :4])


def test_published_bits() -> None:
    assert binary_formula((4096, 4096), 128, "float16", means=True) == pytest.approx(2.875, abs=5e-4)
    assert binary_formula((4096, 4096), 128, "float16", means=False) == pytest.approx(2.5, abs=5e-4)
    assert partial_formula((4096, 4096), 0.9, 8, 4096, "float16") == pytest.approx(2.7, abs=0.02)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    stored = quantize_linear(w, method="billm", bits=1, hessian=torch.eye(256), scale_dtype="float16")
    assert stored.bits_stored == pytest.approx(2.875 + 1 / 64)
    assert quantize_linear(w, method="billm_joint", bits=1, hessian=torch.eye(256), scale_dtype="float16").bits_stored < 2.52
    half = quantize_linear(w, method="pb_llm", bits=1, hessian=torch.eye(256), scale_dtype="float16", low_fraction=0.5)
    assert half.bits_nominal == 4.5


def test_parts_that_do_not_belong_together_are_refused() -> None:
    tensor = binary(2, 8, 4, 0.5, True, "float16", 0)
    with pytest.raises(ValueError, match="2 x 8 signs in blocks of 3"):
        BinaryTensor.unpack(tensor.pack(), {"shape": [2, 8], "block_size": 3})
    with pytest.raises(ValueError, match="bits take"):
        BinaryTensor.unpack(tensor.pack(), {"shape": [2, 9], "block_size": 4})
    other = partially(2, 8, 4, 0.5, 8, "float16", 0)
    with pytest.raises(ValueError, match="2 x 8 codes in groups of 3"):
        PartiallyBinaryTensor.unpack(other.pack(), {**other.meta(), "group": 3})
