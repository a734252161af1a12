"""Bits per weight: what is stored, which every run logs beside the paper's label, and what the formula says of other shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from quant.affine import ZeroKind, group_width
from quant.scheme import NUMBERS, WeightScheme

SCALE_BITS = {"float16": 16, "float32": 32}


def size_bytes(*tensors: Tensor | None) -> int:
    """Of those that there are."""
    return sum(t.nbytes for t in tensors if t is not None)


def bits_stored(payload: Mapping[str, Tensor], weights: int) -> float:
    """8 x bytes of every payload tensor / weights."""
    return 8 * size_bytes(*payload.values()) / weights


def zero_bits(kind: ZeroKind, bits: int, scale_bits: int) -> int:
    """Bits of one stored zero."""
    if kind is ZeroKind.CONSTANT:
        return 0
    if kind is ZeroKind.CODE:
        return bits
    return 16 if kind is ZeroKind.INTEGER else scale_bits


def bits_formula(scheme: WeightScheme, shape: tuple[int, int], kind: ZeroKind = ZeroKind.CODE) -> float:
    """b + (s_bits + z_bits) / g.

    Number formats with a scale of their own type have 8 bits per scale, and float32 constants: one per tensor (nvfp4), one and one
    per 256 scales (nf4_dq).
    4 bits in groups of 128 with float16 scales and integer zeros: 4.156.
    """
    n, k = shape
    if scheme.number != "int":
        return _number_formula(scheme, n, k)
    scale_bits = SCALE_BITS[scheme.scale_dtype]
    return scheme.bits + (scale_bits + zero_bits(kind, scheme.bits, scale_bits)) / group_width(scheme, n, k)


def _number_formula(scheme: WeightScheme, n: int, k: int) -> float:
    g = group_width(scheme, n, k)
    bits = NUMBERS[scheme.number].bits
    assert bits is not None
    if scheme.number in ("fp8_e4m3", "fp8_e5m2", "nf4"):
        return bits + SCALE_BITS[scheme.scale_dtype] / g
    constants = {"nvfp4": 1, "nf4_dq": 1 + math.ceil(n * k / g / 256)}.get(scheme.number, 0)
    return bits + 8 / g + 32 * constants / (n * k)
