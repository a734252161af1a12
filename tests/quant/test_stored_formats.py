"""Of all stored formats: parts that do not belong together are refused, and the type of an input scale, an index or a list of weights kept
aside is the narrowest that holds it. Sizes are counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.errors import ScaleDtypeError
from quant.tensors import unpack
from quant.tensors.affine import AffineTensor
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor, Outliers
from quant.tensors.codebook import bits_formula as codebook_formula
from quant.tensors.columns import ColumnsTensor
from quant.tensors.columns import bits_formula as columns_formula
from quant.tensors.floating import FloatingTensor
from quant.tensors.lattice import LatticeTensor
from quant.tensors.lattice import bits_formula as lattice_formula
from quant.tensors.mixed import MixedTensor
from quant.tensors.mixed import bits_formula as mixed_formula
from quant.tensors.packing import unpack_bits
from quant.tensors.partially_binary import PartiallyBinaryTensor
from quant.tensors.row_codebook import RowCodebookTensor
from quant.tensors.sparse import SparseTensor, TwoLevel
from quant.tensors.sparse import bits_formula as sparse_formula
from quant.tensors.strided import StridedTensor


def flags(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


def affine(scale: tuple[int, int] = (2, 4), zero: tuple[int, int] = (2, 4)) -> AffineTensor:
    return AffineTensor(codes(2, 8), ones(*scale), codes(*zero), 3, ZeroKind.CODE)


def binary(salient: int = 8, scale: tuple[int, ...] = (2, 2, 4), mean: tuple[int, ...] = (2, 2, 3)) -> BinaryTensor:
    return BinaryTensor(flags(2, 8), flags(2, 8), flags(2, 8), flags(salient), ones(*scale), ones(*mean), 4)


def partial(
    mask: tuple[int, int] = (2, 8), high: tuple[int, int] = (2, 1), scale: tuple[int, int] = (2, 2), mean: tuple[int, int] = (2, 2)
) -> PartiallyBinaryTensor:
    return PartiallyBinaryTensor(codes(2, 8), flags(*mask), ones(*high), codes(2, 1), ones(*scale), ones(*mean), 8, 4, 0.9)


def codebook(widths: int = 8, tables: tuple[int, int] = (8, 4), counts: int = 8) -> CodebookTensor:
    kept = Outliers(torch.zeros(counts, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), ones(0))
    return CodebookTensor(codes(2, 8), torch.full((widths,), 2), ones(*tables), 2.0, kept)


def mixed(
    widths: tuple[int, ...] = (2, 1), base: int = 2, scale: tuple[int, int] = (2, 2), zero: tuple[int, int] = (2, 2), mean: int = 1
) -> MixedTensor:
    return MixedTensor(codes(2, 8), ones(*scale), codes(*zero), ones(2, mean), widths, base)


def sparse(rows: int = 2, groups: int = 4) -> SparseTensor:
    level = TwoLevel(codes(rows, groups), ones(1, groups), ones(1, groups), 3, 2)
    nowhere = torch.zeros(0, dtype=torch.int64)
    return SparseTensor(codes(2, 8), 3, level, level, nowhere, nowhere, ones(0))


def floating(scale: tuple[int, int] = (2, 4)) -> FloatingTensor:
    return FloatingTensor(codes(2, 8), {"scale": ones(*scale)}, "nf4")


def columns(kept: tuple[int, ...] = (1, 7), values: tuple[int, int] = (2, 2)) -> ColumnsTensor:
    return ColumnsTensor(affine(), torch.tensor(kept, dtype=torch.int64), ones(*values))


def strided(scale: tuple[int, ...] = (4,), zero: tuple[int, ...] = (4,)) -> StridedTensor:
    return StridedTensor(codes(2, 8), ones(*scale), ones(*zero), 3)


def by_rows(tables: tuple[int, int] = (2, 8), bits: int = 3) -> RowCodebookTensor:
    return RowCodebookTensor(codes(2, 8), ones(*tables), bits)


def lattice() -> LatticeTensor:
    return LatticeTensor((torch.zeros(2, 1, dtype=torch.int64),), codes(2), codes(8), torch.ones(1), 2)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (affine, [{"scale": (3, 4), "zero": (3, 4)}, {"scale": (2, 3), "zero": (2, 3)}, {"zero": (2, 2)}]),
        (binary, [{"salient": 7}, {"scale": (2, 2, 3)}, {"mean": (2, 1, 3)}]),
        (partial, [{"mask": (2, 7)}, {"high": (2, 2)}, {"scale": (2, 3)}, {"mean": (2, 1)}]),
        (codebook, [{"widths": 7}, {"tables": (8, 8)}, {"counts": 7}]),
        (mixed, [{"scale": (2, 1)}, {"zero": (2, 1)}, {"mean": 2}, {"widths": (2, 1, 2)}, {"widths": ()}, {"widths": (8, 9), "base": 8}]),
        (mixed, [{"widths": (1, 0), "base": 1}]),
        (sparse, [{"rows": 3}, {"groups": 3}]),
        (floating, [{"scale": (3, 4)}, {"scale": (2, 3)}]),
        (columns, [{"values": (2, 3)}, {"values": (3, 2)}, {"kept": (-1, 7)}, {"kept": (1, 8)}]),
        (strided, [{"scale": (3,), "zero": (3,)}, {"zero": (2,)}, {"scale": (0,), "zero": (0,)}, {"scale": (2, 2), "zero": (2, 2)}]),
        (by_rows, [{"tables": (2, 4)}, {"tables": (3, 8)}, {"tables": (2, 32), "bits": 5}]),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(make: Callable[..., Any], wrong: list[dict[str, Any]]) -> None:
    assert make().shape == (2, 8)
    for parts in wrong:
        with pytest.raises(ValueError, match=r"belong|must lie between 1 and 8|tables of rows are for"):
            make(**parts)


def test_groups_of_columns_anywhere_need_not_divide_them() -> None:
    """Where each column says which is its own."""
    index = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    stored = AffineTensor(codes(2, 8), torch.tensor([[1.0, 2, 3]] * 2), codes(2, 3) + 1, 3, ZeroKind.CODE, index)
    assert torch.equal(stored.dequantize(), -(index + 1.0).expand(2, 8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_stream_holds_codes_and_no_more(bits: int) -> None:
    """Bit i of code j is bit j · bits + i of the stream; counts that end inside a byte and at its end."""
    for count in range(17):
        given = [(5 * j + 3) % 2**bits for j in range(count)]
        number = sum(code << j * bits for j, code in enumerate(given))
        stream = list(number.to_bytes(-(-count * bits // 8), "little"))
        assert unpack_bits(torch.tensor(stream, dtype=torch.uint8), bits, count).tolist() == given
    with pytest.raises(ValueError, match="int16"):
        unpack_bits(torch.zeros(bits, dtype=torch.int16), bits, 8)


@pytest.mark.parametrize("make", [affine, binary, partial, codebook, mixed, sparse, floating, columns, strided, by_rows, lattice])
def test_an_input_scale_is_kept_like_the_scales_where_that_changes_no_value(make: Callable[..., Any]) -> None:
    """In float16 here, of 8 columns; one third is none of float16's numbers, a third of three is."""
    stored, thirds = make(), torch.full((8,), 1 / 3)
    for scale, each in ((2.0 ** torch.arange(8), 16), (thirds, 32)):
        scaled = stored.with_input_scale(scale)
        assert (scaled.bits_stored - stored.bits_stored) * 16 == pytest.approx(each * 8)
        assert torch.equal(scaled.dequantize(), stored.dequantize() / scale)
    assert stored.with_input_scale(thirds).with_input_scale(torch.full((8,), 3.0)).bits_stored < stored.with_input_scale(thirds).bits_stored


@pytest.mark.parametrize(
    "stored",
    [
        AffineTensor(codes(2, 8), torch.ones(2, 4), codes(2, 4), 3, ZeroKind.CODE),
        FloatingTensor(codes(2, 32), {"scale": codes(2, 1) + 127}, "mxfp8"),
    ],
)
def test_an_input_scale_is_float32_where_scales_are_or_no_floats(stored: Any) -> None:
    n, k = stored.shape
    assert (stored.with_input_scale(torch.ones(k)).bits_stored - stored.bits_stored) * n * k == pytest.approx(32 * k)


@pytest.mark.parametrize(("groups", "each"), [(256, 8), (257, 16)])
def test_a_columns_group_takes_a_byte_up_to_256_of_them(groups: int, each: int) -> None:
    ranges = Affine(torch.ones(1, groups), torch.zeros(1, groups), 4, ZeroKind.CONSTANT)
    plain, permuted = (AffineTensor.build(codes(1, groups), ranges, torch.float16, g_idx=g) for g in (None, torch.arange(groups).flip(0)))
    assert (permuted.bits_stored - plain.bits_stored) * groups == each * groups


def test_what_codebooks_take_is_counted() -> None:
    """5 rows, 9 columns of 1 or 2 bits, 2 outliers: rows of 3 bits. Which width a column has is one bit."""
    widths = torch.tensor([1, 2, 1, 1, 2, 1, 1, 1, 1])
    counts = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1])
    stored = CodebookTensor(codes(5, 9), widths, ones(9, 4), 1.0, Outliers(counts, torch.tensor([4, 0]), ones(2)))
    streams = math.ceil(5 * 7 / 8) + math.ceil(5 * 2 * 2 / 8) + math.ceil(9 / 8) + math.ceil(2 * 3 / 8)
    tables, values, numbers = 2 * (7 * 2 + 2 * 4), 2 * 2, 9
    assert stored.bits_stored == 8 * (streams + tables + values + numbers) / 45
    assert codebook_formula(widths.tolist(), 5, 16, 2) == pytest.approx((5 * (7 + 4) + 16 * 22 + 2 * (16 + 3)) / 45)
    assert codebook_formula(widths.tolist(), 5, 16) == pytest.approx((5 * (7 + 4) + 16 * 22) / 45)


def test_what_groups_of_several_widths_take_is_counted() -> None:
    """3 rows of a group of 2 columns in 3 bits (a code, a scale of 16 bits and a zero of 3) and one in 1 bit (a scale and a mean)."""
    assert mixed_formula([3, 1], 3, 2) == pytest.approx((3 * (2 * 3 + 16 + 3) + 3 * (2 * 1 + 16 + 16) + 2 * 2) / 12)


def test_what_a_lattice_takes_is_counted() -> None:
    """16 bits for 8 weights, a bit for each row and column, 32 for the scale; streams of signs end with a byte."""
    assert lattice_formula(2, 2, 8) == pytest.approx((2 * 16 + 2 + 8 + 32) / 16)
    assert lattice().bits_stored == (2 * 16 + 8 + 8 + 32) / 16


def test_what_two_levels_of_statistics_take_is_counted() -> None:
    """10 rows of 12 columns of 2 bits; groups of 4 columns with scales of 3 and zeros of 5 bits, over groups of 5 rows with four values
    of 16 bits; the paper counts 32 bits for each of 3 outliers."""
    scale, zero = (TwoLevel(codes(10, 3), ones(2, 3), ones(2, 3), bits, 5) for bits in (3, 5))
    at = torch.tensor([0, 1, 9])
    by_hand = 120 * 2 + 30 * 3 + 2 * 3 * 4 * 16 + 3 * 32
    two = SparseTensor(codes(10, 12), 2, scale, zero, at, at, ones(3))
    assert two.bits_nominal == pytest.approx((by_hand + 30 * 5) / 120)
    # A zero that is a code: of 2 bits, and without a second level.
    one = SparseTensor(codes(10, 12), 2, scale, codes(10, 3), at, at, ones(3))
    assert one.bits_nominal == pytest.approx((by_hand + 30 * 2 - 2 * 3 * 2 * 16) / 120)
    assert sparse_formula(2, 4, 5, 3, None, 3 / 120) == pytest.approx(one.bits_nominal)
    assert not any(name.startswith("outlier") for name in sparse().pack())


@pytest.mark.parametrize(("k", "kind"), [(2**15 + 1, torch.int16), (2**16, torch.int16), (2**16 + 1, torch.int32)])
def test_columns_of_weights_kept_aside_take_16_bits_where_those_number_them(k: int, kind: torch.dtype) -> None:
    level, last = TwoLevel(codes(1, 1), ones(1, 1), ones(1, 1), 3, 1), torch.tensor([0, k - 1])
    payload = SparseTensor(codes(1, k), 3, level, level, torch.zeros(2, dtype=torch.int64), last, ones(2)).pack()
    assert payload["outlier_columns"].dtype is kind
    again: Any = unpack("sparse", payload, {**sparse().meta(), "shape": [1, k], "groups": 1, "stat_rows": 1})
    assert torch.equal(again.outlier_columns, last)


@pytest.mark.parametrize(("k", "each"), [(2**14 + 1, 16), (2**15, 16), (2**15 + 1, 32)])
def test_a_kept_columns_number_takes_16_bits_up_to_32768_of_them(k: int, each: int) -> None:
    rest = AffineTensor(codes(1, k), ones(1, 1), codes(1, 1), 3, ZeroKind.CODE)
    stored = ColumnsTensor(rest, torch.tensor([0, k - 1]), ones(1, 2))
    assert (stored.bits_stored - rest.bits_stored) * k == pytest.approx(2 * (16 + each))
    again: Any = unpack("columns", stored.pack(), stored.meta())
    assert again.kept.tolist() == [0, k - 1]
    assert columns_formula(3.0, 2, (1, k)) == pytest.approx(3 + 2 * 2 * 16 / k, rel=1e-9)


@pytest.mark.parametrize("base", [0.0, 1000.3, -1000.3])
def test_statistics_are_codes_within_their_bits(base: float) -> None:
    """In float16 ends may be off by 2^-9 of the greatest magnitude, a value by half a step more: beyond the end it is the end."""
    values = base + torch.tensor([0.0, 0.3, 0.6, 1.0])[:, None].repeat(1, 2) * torch.tensor([1.0, 0.0])
    made = TwoLevel.fit(values, 3, 4, torch.float16)
    assert int(made.codes.max()) <= 7  # uint8, in which one below 0 would be large
    off = (made.values(torch.float32) - values).abs()
    assert bool((off <= 0.5 / 7 + 2.0**-9 * max(1.0, abs(base))).all())


def test_one_grid_that_does_not_fit_is_refused_among_others() -> None:
    """A step that float16 flushes to 0 is missed by the whole range, on whichever side of 0 that lies."""
    good, lost = torch.linspace(0, 1, 4), torch.linspace(0, 1e-7, 4)
    for sign in (1, -1):
        TwoLevel.fit(sign * good[:, None], 3, 4, torch.float16)
        with pytest.raises(ScaleDtypeError, match="1 of 2 grids"):
            TwoLevel.fit(sign * torch.stack([good, lost], 1), 3, 4, torch.float16)
        TwoLevel.fit(sign * lost[:, None], 3, 4, torch.float32)
