"""Bits per weight that a stored tensor would take for a matrix of another shape: the formula of its format, at that shape.

What depends on the weights stays as found: the share of outliers, of salient columns, of codes in a mask, the widths of columns and groups.
What a method keeps as a count (outlier columns) stays that count. At its own shape a tensor's formula is its `bits_stored`, but for the
last bytes of bit streams.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from quant.accounting import zero_bits
from quant.number_formats import SCALE_BLOCK, number_format
from quant.tensors import codebook, columns, lattice, mixed, row_codebook, sparse
from quant.tensors.affine import AffineTensor
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from quant.tensors.columns import ColumnsTensor
from quant.tensors.floating import FloatingTensor
from quant.tensors.incoherent import IncoherentTensor
from quant.tensors.lattice import LatticeTensor
from quant.tensors.mixed import MixedTensor
from quant.tensors.partially_binary import PartiallyBinaryTensor
from quant.tensors.row_codebook import RowCodebookTensor
from quant.tensors.sparse import SparseTensor
from quant.tensors.strided import StridedTensor

LARGE = (4096, 4096)


def bits_at(stored: Any, n: int, k: int) -> float:
    """Bits per weight of `stored` (a format of quant/tensors/) if it had n rows and k columns. Raises TypeError for an unknown format."""
    for kind, formula in _FORMULAS.items():
        if isinstance(stored, kind):
            return float(formula(stored, n, k)) + _width(getattr(stored, "input_scale", None)) / n
    raise TypeError(f"no formula for the stored format {type(stored).__name__}; those known are {', '.join(t.__name__ for t in _FORMULAS)}")


def _width(t: Tensor | None) -> int:
    return 0 if t is None else 8 * t.element_size()


def _groups(scale: Tensor, shape: tuple[int, int], n: int, k: int) -> float:
    """Scales of an n x k matrix whose scales here are `[R, G]`: one for the tensor, one a row, or one per group of the same width."""
    rows, groups = scale.shape
    if groups == 1:
        return 1 if rows == 1 else n
    return n * k / (shape[1] / groups)


def _affine(t: AffineTensor, n: int, k: int) -> float:
    scale = _width(t.scale)
    kept = _groups(t.scale, t.shape, n, k) * (scale + zero_bits(t.kind, t.bits, scale))
    return t.bits + kept / (n * k) + _width(t.g_idx) / n


def _floating(t: FloatingTensor, n: int, k: int) -> float:
    count = _groups(t.scales["scale"], t.shape, n, k)
    bits = count * _width(t.scales["scale"])
    for name, each in (("tensor_scale", 1), ("scale_offset", 1), ("scale_scale", math.ceil(count / SCALE_BLOCK))):
        bits += _width(t.scales.get(name)) * each
    return number_format(t.number).element.bits + bits / (n * k)


def _strided(t: StridedTensor, n: int, k: int) -> float:
    return t.bits + 2 * _width(t.scale) * t.scale.numel() / t.codes.numel()


def _columns(t: ColumnsTensor, n: int, k: int) -> float:
    return columns.bits_formula(bits_at(t.rest, n, k), t.kept.numel(), (n, k))


def _binary(t: BinaryTensor, n: int, k: int) -> float:
    # A sign for all, a second one or a split flag; a flag per column; scales and means per row and block.
    means = 0 if t.mean is None else 3
    return 2 + 1 / n + math.ceil(k / t.block_size) / k * (4 + means) * _width(t.scale)


def _partially_binary(t: PartiallyBinaryTensor, n: int, k: int) -> float:
    coded = float(t.mask.double().mean())
    groups = 1 if t.scale.shape[1] == 1 else math.ceil(k / t.group)
    return 2 + coded * (t.high_bits - 1) + (_width(t.high_scale) + t.high_bits + 2 * groups * _width(t.scale)) / k


def _codebook(t: CodebookTensor, n: int, k: int) -> float:
    rows, width = t.shape[0], _width(t.tables)
    kept = 0 if t.outliers is None else t.outliers.values.numel() * n / rows
    counts = 0 if t.outliers is None else 8 if n < 2**8 else 16 if n < 2**15 else 32
    widths = (len(set(t.widths.tolist())) - 1).bit_length()
    return float(codebook.bits_formula(t.widths.tolist(), n, width, round(kept))) + (counts + widths) / n


def _row_codebook(t: RowCodebookTensor, n: int, k: int) -> float:
    return row_codebook.bits_formula(t.bits, k, _width(t.tables))


def _mixed(t: MixedTensor, n: int, k: int) -> float:
    return mixed.bits_formula(t.widths, n, t.group_size, _width(t.scale))


def _sparse(t: SparseTensor, n: int, k: int) -> float:
    group = k if t.scale.codes.shape[1] == 1 else t.group_size
    zero = t.zero.bits if isinstance(t.zero, sparse.TwoLevel) else None
    counts = 32 / k if t.outlier_values.numel() else 0
    return sparse.bits_formula(t.bits, group, t.scale.rows, t.scale.bits, zero, t.outlier_share) + counts + _width(t.g_idx) / n


def _incoherent(t: IncoherentTensor, n: int, k: int) -> float:
    return t.bits + (_width(t.scale) + _width(t.seed)) / (n * k)


def _lattice(t: LatticeTensor, n: int, k: int) -> float:
    return lattice.bits_formula(t.bits, n, k)


_FORMULAS: dict[type[Any], Any] = {
    AffineTensor: _affine,
    FloatingTensor: _floating,
    StridedTensor: _strided,
    ColumnsTensor: _columns,
    BinaryTensor: _binary,
    PartiallyBinaryTensor: _partially_binary,
    CodebookTensor: _codebook,
    RowCodebookTensor: _row_codebook,
    MixedTensor: _mixed,
    SparseTensor: _sparse,
    IncoherentTensor: _incoherent,
    LatticeTensor: _lattice,
}
