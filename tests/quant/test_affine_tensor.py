"""The stored format: exact packing, honest bits, the same values in a fresh process."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import quantize_linear
from quant.accounting import bits_formula
from quant.affine import Affine, ZeroKind
from quant.grids import GRIDS
from quant.scheme import Granularity, WeightScheme
from quant.tensors import unpack
from quant.tensors.affine import AffineTensor
from quant.tensors.packing import narrowest, pack_bits, unpack_bits


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(0, 9), k=st.integers(1, 37), seed=st.integers(0, 99))
def test_packing_is_dense_and_exact(bits: int, n: int, k: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    stream = pack_bits(codes, bits)
    assert stream.numel() == -(-n * k * bits // 8)
    assert torch.equal(unpack_bits(stream, bits, n * k).view(n, k), codes)


def test_a_stream_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes; got 5"):
        unpack_bits(torch.zeros(5, dtype=torch.uint8), 3, 10)


def same(a: AffineTensor, b: AffineTensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.dequantize(), b.dequantize()) and a.bits_stored == b.bits_stored


@settings(max_examples=40, deadline=None)
@given(
    grid=st.sampled_from(sorted(GRIDS)),
    bits=st.integers(2, 8),
    n=st.integers(1, 7),
    groups=st.integers(1, 4),
    width=st.integers(1, 13),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 99),
)
def test_pack_and_unpack_are_inverse_on_every_grid(grid: str, bits: int, n: int, groups: int, width: int, dtype: str, seed: int) -> None:
    weight = torch.randn(n, groups * width, generator=torch.Generator().manual_seed(seed))
    tensor = quantize_linear(weight, method="rtn", bits=bits, group_size=width, grid=grid, scale_dtype=dtype)
    assert isinstance(tensor, AffineTensor)
    meta = json.loads(json.dumps(tensor.meta()))
    again = unpack(tensor.format, tensor.pack(), meta)
    assert isinstance(again, AffineTensor)
    assert same(tensor, again)
    payload_bytes = sum(len(t.numpy().tobytes()) for t in tensor.pack().values())
    assert tensor.bits_stored == 8 * payload_bytes / weight.numel()
    assert tensor.bits_nominal == bits


def test_group_index_and_input_scale_survive_packing() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 24, generator=generator), torch.randn(3, 40, 24, generator=generator)
    tensor = quantize_linear(weight, method="gptq", bits=3, group_size=6, act_order=True, inputs=x)
    scaled = tensor.with_input_scale(torch.linspace(0.5, 2, 24))
    assert {"g_idx", "input_scale"} <= set(scaled.pack())
    again = unpack(scaled.format, scaled.pack(), scaled.meta())
    assert torch.equal(scaled.dequantize(), again.dequantize())
    assert torch.allclose(scaled.dequantize(), tensor.dequantize() / torch.linspace(0.5, 2, 24), rtol=1e-6)


def test_an_unknown_stored_format_is_named() -> None:
    with pytest.raises(ValueError, match="stored format 'codebook9' is unknown; this version reads affine, "):
        unpack("codebook9", {}, {})


@pytest.mark.parametrize("largest", [0, 255, 256, 2**15 - 1, 2**15, 2**31 - 1])
def test_integers_are_stored_whole_in_the_narrowest_type(largest: int) -> None:
    kind = narrowest(largest)
    assert int(torch.tensor(largest).to(kind)) == largest
    narrower = [t for t in (torch.uint8, torch.int16) if t.itemsize < kind.itemsize]
    assert all(int(torch.tensor(largest).to(t)) != largest for t in narrower)


def test_columns_of_many_groups_keep_theirs() -> None:
    g = torch.Generator().manual_seed(0)
    index = torch.randperm(300, generator=g).repeat(2)
    affine = Affine(torch.rand(2, 300, generator=g) + 0.5, torch.randint(16, (2, 300), generator=g).float(), 4, ZeroKind.CODE)
    codes = torch.randint(16, (2, 600), generator=g).float()
    tensor = AffineTensor.build(codes, affine, torch.float32, g_idx=index)
    again = unpack(tensor.format, tensor.pack(), tensor.meta())
    assert torch.equal(again.dequantize(), (codes - affine.zero[:, index]) * affine.scale[:, index])


@pytest.mark.parametrize(("bits", "group", "published"), [(4, 128, 4.156), (3, 128, 3.148), (2, 128, 2.141), (2, 64, 2.281)])
def test_formula_gives_the_published_bits(bits: int, group: int, published: float) -> None:
    scheme = WeightScheme(bits, granularity=Granularity.GROUP, group_size=group)
    assert bits_formula(scheme, (4096, 4096)) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize(("bits", "group", "shape"), [(3, None, (7, 50)), (4, 10, (3, 50)), (2, 16, (16, 64)), (8, 64, (1, 64))])
def test_stored_bits_are_the_formula_up_to_a_word_per_tensor(
    bits: int, group: int | None, shape: tuple[int, int], grid: str, scale_dtype: str
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    tensor = quantize_linear(weight, method="rtn", bits=bits, group_size=group, grid=grid, scale_dtype=scale_dtype)
    scheme = WeightScheme(bits, False, Granularity.CHANNEL if group is None else Granularity.GROUP, group, scale_dtype)
    formula = bits_formula(scheme, shape, GRIDS[grid].zero)
    assert 0 <= (tensor.bits_stored - formula) * weight.numel() <= 8 * len(tensor.pack())


def test_act_order_groups_pay_for_their_index() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 256, generator=generator), torch.randn(4, 300, 256, generator=generator)
    plain = quantize_linear(weight, method="gptq", bits=4, group_size=64, inputs=x)
    permuted = quantize_linear(weight, method="gptq", bits=4, group_size=64, inputs=x, act_order=True)
    assert permuted.bits_stored - plain.bits_stored == 8 / 32
    scheme = WeightScheme(4, False, Granularity.GROUP, 64, "float32")
    assert permuted.bits_stored == pytest.approx(bits_formula(scheme, (32, 256)) + 8 / 32)
