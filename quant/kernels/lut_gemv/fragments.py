"""The layout that `quant/csrc/lut_gemv_cuda.h` reads: codes as lanes of a warp want them for products of 16 x 32 bytes.

A unit is 64 rows by 32 columns: 2 · bits words of each of 32 lanes. Lane 4 g + t has, of the columns t and t + 4 of each of four groups of
8 columns, the rows 4 g + j and 4 (g + 8) + j, j = 0 to 3. Nibble j of a word's lower half is the former's, of its upper half the latter's:
- 2 bits: word i is group i; the lower two bits of a nibble are column t, the others column t + 4
- 4 bits: words 2 i and 2 i + 1 are columns t and t + 4 of group i
- 3 bits: words 0 to 2 and 3 to 5 are two groups each: the lower three bits of their nibbles are columns t and t + 4 of the first group and
  t of the second, the highest bits of the three words the three bits of the second's column t + 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels.lut_gemv import MOST_BITS, Packed, Part, apart_of, laid_out_as
from quant.tensors.codebook import CodebookTensor

TILE, UNIT = 64, 32
LEAST_BITS = 2
"""Columns of one bit are stored as if they had two: their tables end in zeros."""
MOST_COLUMNS = 2**24
"""A column's number and its table's exponent share a word."""


def prepare(tensor: CodebookTensor) -> Packed:
    """The same codes, laid out anew: words int32 `[T, U, 64 bits]`, tiles of 64 rows and units of 32 columns, padded with zeros. Raises
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
    return laid_out_as(packed, TILE, True)


def _part(tensor: CodebookTensor, widths: Tensor, bits: int) -> Part:
    columns = (widths == bits).nonzero()[:, 0]
    values = tensor.tables[columns, : 2**bits].float()
    values = pad(values, (0, 2**bits - values.shape[1])).contiguous()
    return Part(laid_out(tensor.codes[:, columns], bits), values, columns, bits)


def laid_out(codes: Tensor, bits: int) -> Tensor:
    """Words of codes uint8 `[N, C]`."""
    n, count = codes.shape
    tiles, units = -(-n // TILE), -(-count // UNIT)
    given = pad(codes, (0, units * UNIT - count, 0, tiles * TILE - n)).view(tiles, 2, 8, 4, units, 4, 2, 4)
    given = given.permute(0, 4, 2, 7, 5, 6, 1, 3)  # [T, U, g, t, group, column of 2, half, j]
    words = torch.zeros(tiles, units, 8, 4, 2 * bits, dtype=torch.int32, device=codes.device)
    for half in range(2):
        for j in range(4):
            some = given[..., half, j].to(torch.int32)
            for where, word in _nibbles(some, bits):
                words[..., where] |= word << (16 * half + 4 * j)
    words = words.view(tiles, units, 32, 2 * bits)
    return torch.cat([words[..., i : i + 4].reshape(tiles, units, -1) for i in range(0, 2 * bits, 4)], 2)


def _nibbles(some: Tensor, bits: int) -> list[tuple[slice, Tensor]]:
    """Words of a lane, and what a row's codes `[..., group, column of 2]` put into a nibble of each."""
    if bits == 2:
        return [(slice(0, 4), some[..., 0] | some[..., 1] << 2)]
    if bits == 4:
        return [(slice(0, 8), some.flatten(-2))]
    pairs = some.reshape(*some.shape[:-2], 2, 4)  # [..., pair of groups, 4]
    last = torch.stack([pairs[..., 3] >> b & 1 for b in range(3)], -1)
    return [(slice(0, 6), (pairs[..., :3] | last << 3).flatten(-2))]
