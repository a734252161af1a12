"""A tile for Triton, read and written by whole lines."""

import triton
import triton.language as tl


@triton.jit
def turn(
    source,  # [R, C]
    out,  # [C, R]
    r,
    c,
    source_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    top, aside = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    # Where a tile begins may lie beyond 2^31 numbers; within it 32 bits do.
    at = source + tl.cast(top, tl.int64) * source_stride + aside + (rows[:, None] * source_stride + columns[None, :])
    v = tl.load(at, mask=(top + rows < r)[:, None] & (aside + columns < c)[None, :], other=0.0)
    to = out + tl.cast(aside, tl.int64) * out_stride + top + (columns[:, None] * out_stride + rows[None, :])
    tl.store(to, tl.trans(v.to(out.dtype.element_ty)), mask=(aside + columns < c)[:, None] & (top + rows < r)[None, :])
