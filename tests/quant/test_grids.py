"""Grids and RTN: what each grid promises, on ordinary and on degenerate groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.errors import NonFiniteError, ScaleDtypeError
from quant.grids import GRIDS, choose_grid, fit, grid
from quant.methods.rtn import Rtn
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor

ASYMMETRIC = ["g_asym", "awq_asym", "omni", "hqq", "kivi"]


def random_weight(n: int = 6, k: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def rtn(weight: Tensor, scheme: WeightScheme, name: str | None = None, mse: bool = False) -> AffineTensor:
    tensor = Rtn(grid=name, mse=mse).quantize(weight, Statistics(), scheme).tensor
    assert isinstance(tensor, AffineTensor)
    return tensor


def by_the_table(name: str, group: list[float], bits: int) -> tuple[float, float]:
    """Scale and zero as the docstring of `quant.grids` has them, in Python's own numbers."""
    low, high, top, half = min(group), max(group), 2**bits - 1, 2 ** (bits - 1)
    m = max(-low, high)
    if name == "g_sym":
        return (2 * m if low < 0 else m) / top, half
    if name == "q_sym":
        return m / (half - 1), half
    if name == "absmax":
        return max(m, 1e-5) / (half - 1), half
    if name == "kivi":
        return (high - low) / top, low
    if name == "hqq":
        scale = 1 / min(top / (high - low), 2e4) if high - low > 1e-4 else 1.0
        return scale, -low / scale
    if name == "awq_asym":
        scale = max(high - low, 1e-5) / top
        return scale, min(max(round(-low / scale), 0), top)
    if name == "g_asym" or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / top if name == "g_asym" else min(max((high - low) / top, 1e-5), 1e4)
    return scale, round(-low / scale) if name == "g_asym" else min(max(round(-low / scale), -10000), 10000)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_grid_is_its_row_of_the_table(name: str, bits: int) -> None:
    spread = random_weight(12, 8).double()
    # Both ends larger once, one sign only, next to no width far from 0 and at it, widths at which one bound or another takes hold.
    offset = torch.tensor([0.0, 1, -1, 9, -9, 9, -9, 0, 0, 0, 0, 0], dtype=torch.float64)[:, None]
    width = torch.tensor([1.0, 1, 1, 1, 1, 1e-5, 0, 1e-2, 5e-5, 1e-5, 1e-7, 1e7], dtype=torch.float64)[:, None]
    groups = offset + width * spread
    got = fit(grid(name), groups, bits, torch.float64)
    want = torch.tensor([by_the_table(name, group, bits) for group in groups.tolist()], dtype=torch.float64)
    # The same few operations in float64, of which each is off by 2^-53 at most.
    torch.testing.assert_close(torch.cat([got.scale, got.zero], 1), want, rtol=1e-14, atol=0)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(ASYMMETRIC), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_asymmetric_grids_that_see_both_signs_err_at_most_half_a_step(name: str, bits: int, seed: int) -> None:
    weight = random_weight(3, 20, seed)
    tensor = rtn(weight, WeightScheme(bits, scale_dtype="float32"), name)
    # An integer zero moves the grid by up to half a step more, at the ends only.
    steps = ((tensor.dequantize() - weight).abs() / tensor.scale).amax()
    assert float(steps) <= (0.5 if name in ("hqq", "kivi") else 1.0) + 1e-4


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_degenerate_groups_give_finite_values(name: str, scale_dtype: str, mse: bool) -> None:
    weight = torch.stack([torch.zeros(8), torch.ones(8), -torch.ones(8), torch.full((8,), 1e-3), random_weight(1, 8)[0].abs()])
    tensor = rtn(weight, WeightScheme(4, scale_dtype=scale_dtype), name, mse)
    q = tensor.dequantize()
    assert torch.isfinite(q).all()
    assert int(tensor.codes.max()) < 16
    assert torch.all(q[0] == 0)
    if name in ("g_asym", "kivi", "q_sym", "absmax"):
        torch.testing.assert_close(q[1:3], weight[1:3], rtol=1e-3, atol=0)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(GRIDS)), bits=st.integers(2, 6), seed=st.integers(0, 99))
def test_range_search_never_raises_its_error(name: str, bits: int, seed: int) -> None:
    weight = random_weight(4, 24, seed)
    scheme = WeightScheme(bits, scale_dtype="float32")
    errors = [(rtn(weight, scheme, name, mse).dequantize() - weight).abs().pow(2.4).sum(1) for mse in (False, True)]
    assert torch.all(errors[1] <= errors[0] * (1 + 1e-5))


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_what_was_rounded_on_the_same_grid_changes_nothing(name: str, bits: int) -> None:
    weight = random_weight()
    affine = fit(grid(name), weight, bits, torch.float32)
    once = affine.round(weight)
    assert torch.equal(affine.encode(once), affine.encode(weight))


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_codes_are_nearest_for_the_scale_that_is_stored(name: str) -> None:
    weight = random_weight(4, 64)
    tensor = rtn(weight, WeightScheme(4, granularity=Granularity.GROUP, group_size=16), name)
    assert tensor.scale.dtype is torch.float16
    q = tensor.dequantize()
    step = tensor.columns(tensor.scale)
    inside = (tensor.codes > 0) & (tensor.codes < 15)
    assert torch.all(((q - weight).abs() <= 0.5001 * step)[inside])


def test_symmetric_grids_mirror() -> None:
    weight = random_weight()
    for name in ("q_sym", "absmax"):
        plain, mirrored = (fit(grid(name), w, 8, torch.float32).round(w) for w in (weight, -weight))
        torch.testing.assert_close(plain, -mirrored, rtol=0, atol=0)


def test_g_sym_takes_half_the_range_when_nothing_is_negative() -> None:
    positive = torch.tensor([[0.1, 0.5, 3.0]])
    signed = torch.tensor([[-0.1, 0.5, 3.0]])
    assert float(fit(grid("g_sym"), positive, 4, torch.float32).scale) == pytest.approx(3 / 15)
    assert float(fit(grid("g_sym"), signed, 4, torch.float32).scale) == pytest.approx(6 / 15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_is_accepted_and_never_changed(dtype: torch.dtype) -> None:
    weight = random_weight().to(dtype)
    before = weight.clone()
    tensor = rtn(weight, WeightScheme(4))
    assert torch.equal(weight, before)
    assert torch.equal(tensor.dequantize(), rtn(weight.float(), WeightScheme(4)).dequantize())


def test_one_row_one_group_and_one_scale_per_tensor() -> None:
    row = random_weight(1, 16)
    channel = rtn(row, WeightScheme(4))
    assert torch.equal(channel.dequantize(), rtn(row, WeightScheme(4, granularity=Granularity.GROUP, group_size=16)).dequantize())
    assert torch.equal(channel.dequantize(), rtn(row, WeightScheme(4, granularity=Granularity.TENSOR)).dequantize())
    tensor = rtn(random_weight(), WeightScheme(4, granularity=Granularity.TENSOR))
    assert tensor.scale.shape == (1, 1)
    assert tensor.dequantize().unique().numel() <= 16


@pytest.mark.parametrize("name", ["g_asym", "g_sym", "q_sym", "kivi"])
def test_scales_float16_cannot_hold_are_kept_in_float32_and_noted(name: str) -> None:
    weight = random_weight() * 1e-6
    with pytest.raises(ScaleDtypeError, match="6 of 6 scales or zeros do not fit float16"):
        fit(grid(name), weight, 8, torch.float16)
    rounded = Rtn(grid=name).quantize(weight, Statistics(), WeightScheme(8))
    assert isinstance(rounded.tensor, AffineTensor)
    assert rounded.tensor.scale.dtype is torch.float32
    assert rounded.notes == ["6 of 6 scales or zeros do not fit float16; scales are stored in float32"]
    assert float((rounded.tensor.dequantize() - weight).norm() / weight.norm()) < 0.01


def test_choosing_a_grid_notes_where_it_differs_from_the_scheme() -> None:
    assert choose_grid(None, WeightScheme(4))[0].name == "g_asym"
    assert choose_grid(None, WeightScheme(4, symmetric=True))[0].name == "g_sym"
    chosen, notes = choose_grid("awq_asym", WeightScheme(4, symmetric=True))
    assert (chosen.name, len(notes)) == ("g_sym", 1)
    for name in ("absmax", "q_sym"):
        for symmetric in (False, True):
            chosen, notes = choose_grid(name, WeightScheme(4, symmetric))
            assert (chosen.name, notes) == (name, [])


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"grid='gasym' is not a value for rtn; give one of g_asym, .*did you mean g_asym"):
        Rtn(grid="gasym")
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=172; choose one of 1, 2, 4, 43, 86, 172"):
        rtn(random_weight(2, 172), WeightScheme(4, granularity=Granularity.GROUP, group_size=64))
    bad = random_weight()
    bad[3, 4] = float("inf")
    bad[3, 5] = float("-inf")
    with pytest.raises(NonFiniteError, match=r"2 NaN or infinite values, the first at \(3, 4\)"):
        rtn(bad, WeightScheme(4))
