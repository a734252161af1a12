"""What operators of torch take of a packed weight or cache. See `quant.kernels.library`."""

from __future__ import annotations

from typing import Any

from quant.kernels import binary_gemv, kv_attention, lut_gemv, row_lut_gemv, wq_gemm, wq_gemv
from quant.kernels.kv_attention.per_token import PerTokenPacked

Products = (
    wq_gemv.Packed | wq_gemm.Packed | lut_gemv.Packed | row_lut_gemv.Packed | binary_gemv.Packed | kv_attention.Packed | PerTokenPacked
)


def operands(packed: Products) -> tuple[Any, ...]:
    """What the operator that is named as its package takes besides x: `torch.ops.bitgrid.wq_gemv(x, *operands(packed))`; of a
    `PerTokenPacked` it is `kv_attention_per_token`."""
    if isinstance(packed, PerTokenPacked):
        return packed.keys, packed.values, packed.ranges, packed.counts, packed.bits
    if isinstance(packed, kv_attention.Packed):
        held = (packed.keys, packed.key_ranges, packed.values, packed.value_ranges, packed.window_keys, packed.window_values)
        return *held, packed.counts, packed.key_bits, packed.value_bits
    n = packed.shape[0]
    if isinstance(packed, wq_gemv.Packed):
        return packed.words, packed.ranges, packed.input_scale, n, packed.bits
    if isinstance(packed, wq_gemm.Packed):
        return packed.low, packed.high, packed.scale, packed.zero, packed.input_scale, n, packed.bits
    if isinstance(packed, row_lut_gemv.Packed):
        return packed.words, packed.tables, packed.input_scale, n, packed.bits
    if isinstance(packed, binary_gemv.Packed):
        return packed.words, packed.tables, packed.salient, packed.largest, packed.input_scale, n, packed.block
    parts, kept = packed.parts, packed.apart
    apart = [] if kept is None else [kept.starts, kept.columns, kept.differences]
    return (
        [p.words for p in parts],
        [p.values for p in parts],
        [p.columns for p in parts],
        [p.bits for p in parts],
        apart,
        packed.input_scale,
        n,
    )
