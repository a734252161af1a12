"""The layout that `quant/csrc/lut_gemv_cuda.h` reads: codes as lanes of a warp want them for products of 16 x 256 bits.

A unit is 32 rows by 256 columns. Of each half of 16 rows and each bit of the codes, the lowest first, there are 4 words of each of 32
lanes: lane 4 g + t has rows g and g + 8 of columns 32 t to 32 t + 31, the first lowest, then the same of 128 columns further on.

Tables become terms of the parities of codes' bits, which that file says what for: of a unit's 256 columns, first of each subset, those of
one bit before the others, 8 x 8 x 4 numbers: number 4 j + e of each 32 columns, w, at (j, w, e).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels.lut_gemv import MOST_BITS, Packed, Part, apart_of, laid_out_as
from quant.tensors.codebook import CodebookTensor

TILE, UNIT = 32, 256
LEAST_BITS = 2
"""Columns of one bit are stored as if they had two: their tables end in zeros."""
MOST_COLUMNS = 2**16
"""For sums that fit 32 bits."""
NARROW_BITS = 4
"""In products with bfloat16, terms of more than one bit of codes this wide have two bytes, of steps of their own."""
LEAST = 2.0**-90
"""A column's largest term counts as this where it is smaller, so that no step is too small for float32."""


@dataclass(frozen=True)
class LanesPart(Part):
    """`values` are float32, one after another: tables `[C, 2^bits]`, terms `[U, 2^bits - 1, 8, 8, 4]` and `[U, 256, 2]`, each column's
    largest term and its table's first value; with 4 bits `[U, 256]`, its largest term of more than one bit. `columns` ascend."""

    @property
    def read(self) -> int:
        """Of tables, only `values` reads what they were made of."""
        return self.bytes - 4 * (len(self.columns) << self.bits)


def prepare(tensor: CodebookTensor) -> Packed:
    """The same codes, laid out anew: words int32 `[T, U, 256 bits]`, tiles of 32 rows and units of 256 columns, padded with zeros. Raises
    ValueError for wider columns, or too many."""
    widest = int(tensor.widths.max())
    if widest > MOST_BITS:
        raise ValueError(f"columns of {widest} bits; the packed layout has 1 to {MOST_BITS}: use backend=reference")
    if tensor.shape[1] > MOST_COLUMNS:
        raise ValueError(f"{tensor.shape[1]} columns; the packed layout has {MOST_COLUMNS}: use backend=reference")
    widths = tensor.widths.clamp(min=LEAST_BITS)
    parts = tuple(_part(tensor, widths, int(b)) for b in torch.unique(widths))
    scale = None if tensor.input_scale is None else tensor.input_scale.float()
    return Packed(parts, apart_of(tensor), scale, tensor.shape)


def parts_of(packed: Packed) -> tuple[Part, ...]:
    """Parts, as `prepare` lays them out. Raises ValueError for others."""
    return laid_out_as(packed, UNIT, True)


def _part(tensor: CodebookTensor, widths: Tensor, bits: int) -> Part:
    columns = (widths == bits).nonzero()[:, 0]
    tables = tensor.tables[columns, : 2**bits].float()
    tables = pad(tables, (0, 2**bits - tables.shape[1]))
    terms = terms_of(tables)
    largest = terms.abs().amax(1).maximum(tables[:, 0].abs()).clamp(min=LEAST)
    more = -len(columns) % UNIT
    firsts = pad(torch.stack([largest, tables[:, 0]], 1), (0, 0, 0, more))
    lanes = pad(terms, (0, 0, 0, more)).view(-1, 8, 8, 4, 2**bits - 1).permute(0, 4, 2, 1, 3)
    crossed = [pad(terms[:, bits:].abs().amax(1), (0, more))] if bits == NARROW_BITS else []
    values = torch.cat([tables.flatten(), lanes.flatten(), firsts.flatten(), *crossed])
    return LanesPart(laid_out(tensor.codes[:, columns], bits), values, columns, bits)


def terms_of(tables: Tensor) -> Tensor:
    """float32 `[C, 2^bits - 1]`: a value of a table `[C, 2^bits]` is its first one less twice those of its terms whose subset of the code's
    bits has an odd number of ones; subsets of one bit come first, then the others, each in ascending order."""
    size = tables.shape[1]
    code, subset = torch.arange(size), torch.tensor(sorted(range(1, size), key=lambda s: (s.bit_count() > 1, s)))
    both = subset[None] & code[:, None]
    signs = torch.tensor([[1 - 2 * (v.bit_count() % 2) for v in row] for row in both.tolist()], dtype=torch.float64, device=tables.device)
    return (tables.double() @ signs / size).float()


def laid_out(codes: Tensor, bits: int) -> Tensor:
    """Words of codes uint8 `[N, C]`."""
    n, count = codes.shape
    tiles, units = -(-n // TILE), -(-count // UNIT)
    given = pad(codes, (0, units * UNIT - count, 0, tiles * TILE - n)).view(tiles, 2, 2, 8, units, 2, 4, 32)
    given = given.permute(0, 4, 1, 3, 6, 5, 2, 7)  # [T, U, half, g, t, half of columns, half of 16 rows, column]
    words = torch.zeros(tiles, units, 2, bits, *given.shape[3:7], dtype=torch.int32, device=codes.device)
    for j in range(32):
        some = given[..., j].to(torch.int32)
        for bit in range(bits):
            words[:, :, :, bit] |= (some >> bit & 1) << j
    return words.view(tiles, units, -1)
