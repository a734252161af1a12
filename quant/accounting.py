"""Bits per weight: what is stored, and what the formula says. Both are logged for every run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from quant.affine import ZeroKind, group_width
from quant.scheme import WeightScheme

SCALE_BITS = {"float16": 16, "float32": 32}


def bits_stored(payload: Mapping[str, Tensor], weights: int) -> float:
    """8 x bytes of every payload tensor / weights."""
    return 8 * sum(t.numel() * t.element_size() for t in payload.values()) / weights


def zero_bits(kind: ZeroKind, bits: int, scale_bits: int) -> int:
    """Bits of one stored zero."""
    if kind is ZeroKind.CONSTANT:
        return 0
    if kind is ZeroKind.CODE:
        return bits
    return 16 if kind is ZeroKind.INTEGER else scale_bits


def bits_formula(scheme: WeightScheme, shape: tuple[int, int], kind: ZeroKind = ZeroKind.CODE, *, permuted_groups: bool = False) -> float:
    """b + (s_bits + z_bits) / g, plus an index of log2 K bits per column where groups are permuted (act-order).

    4 bits in groups of 128 with float16 scales and integer zeros: 4.156.
    """
    n, k = shape
    scale_bits = SCALE_BITS[scheme.scale_dtype]
    overhead = (scale_bits + zero_bits(kind, scheme.bits, scale_bits)) / group_width(scheme, n, k)
    return scheme.bits + overhead + (math.ceil(math.log2(k)) / n if permuted_groups else 0.0)
