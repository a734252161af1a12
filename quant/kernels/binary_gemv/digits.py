"""The layout that `quant/csrc/binary_gemv_cuda.h` reads: values of a weight as whole numbers, in digits of a byte.

The largest |value| of a row, in any block, is 2^31 - 2^16; the others are rounded to as many times what 1 is worth then. To that
2^31 + 2^15 + 2^7 is added, so that of the sum's four bytes, from the highest on, the first two alone, or three, are off by half of their
last bit and 2^-8 of that, above or below. A word has a byte for each of four codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels import binary_gemv
from quant.kernels.binary_gemv import UNIT, Packed
from quant.tensors.binary import BinaryTensor

MOST, OFFSET = 2**31 - 2**16, 2**31 + 2**15 + 2**7
LEAST = 2.0**-97
"""A row's largest value counts as this much at least."""


def prepare(tensor: BinaryTensor) -> Packed:
    """As `quant.kernels.binary_gemv.prepare`, but for
    - tables: int32 `[2, T, B, 8, 4]`, of a row first the two highest digits of its values in plain columns, then those in salient ones;
      and the third digits of both kinds, then the fourth
    - salient: int32 `[U, 16]`; word 8 odd + l has 4 in the four bits from 4 i on where column 8 (2 i + odd) + l is salient"""
    packed = binary_gemv.prepare(tensor)
    largest = packed.largest.double()[:, None, :, None]
    numbers = (packed.tables * (MOST / largest.clamp(min=LEAST))).nan_to_num(0).round().long() + OFFSET
    numbers = torch.where(largest.isfinite(), numbers, OFFSET)
    numbers = numbers.view(*numbers.shape[:3], 2, 4)  # [T, B, 8, kind, code]
    digits = torch.stack([_word((numbers >> shift) & 255, 8) for shift in (24, 16, 8, 0)], dim=-1)  # [T, B, 8, kind, digit]
    tables = torch.stack([digits[..., :2].flatten(-2), digits[..., 2:].mT.flatten(-2)])
    columns = packed.salient.view(-1, UNIT // 16, 2, 8).permute(0, 2, 3, 1).long()  # [U, odd, l, i]
    return Packed(packed.words, tables, _word(columns, 4).flatten(1), packed.largest, packed.input_scale, packed.shape, packed.block)


def check(packed: Packed) -> None:
    """Raises ValueError for what `prepare` has not laid out."""
    if not packed.has_digits:
        raise ValueError("tables are laid out for other backends; this one takes those of quant.kernels.binary_gemv.digits")


def values_of(tables: Tensor, largest: Tensor) -> Tensor:
    """float32 `[T, B, 8, 8]`, as `quant.kernels.binary_gemv.prepare` has them, off by 2^-32 of the row's largest, and three roundings."""
    high, low = (tables.long() & 0xFFFFFFFF).view(*tables.shape[:4], 2, 2)
    digits = torch.cat([high, low.mT], dim=-1)  # [T, B, 8, kind, digit]
    shifts = torch.tensor([24, 16, 8, 0], device=tables.device)
    numbers = torch.stack([((digits >> 8 * code & 255) << shifts).sum(-1) for code in range(4)], dim=-1).flatten(-2) - OFFSET
    one = torch.tensor(1 / MOST, dtype=torch.float32, device=tables.device)
    return numbers.float() * one * largest.clamp(min=LEAST)[:, None, :, None]


def salient_of(kinds: Tensor) -> Tensor:
    """int32 `[U · 128]`, as `quant.kernels.binary_gemv.prepare` has them."""
    shifts = torch.arange(0, 32, 4, device=kinds.device, dtype=torch.int32)
    return (kinds.view(-1, 2, 8, 1) >> shifts & 4).permute(0, 3, 1, 2).flatten()


def _word(parts: Tensor, bits: int) -> Tensor:
    """int32: the last dimension's numbers, the first lowest."""
    whole = torch.stack([parts[..., i] << bits * i for i in range(parts.shape[-1])]).sum(0)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()
