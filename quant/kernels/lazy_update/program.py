"""A tile of `later` for Triton, minus a product over few columns, on tensor cores with nearly the accuracy of float32."""

import triton
import triton.language as tl


@triton.jit
def update(
    later,  # [R, N]
    left,  # [R, B]
    right,  # [B, N]
    r,
    n,
    later_stride,
    left_row,
    left_column,
    right_stride,
    B: tl.constexpr,
    PADDED: tl.constexpr,  # a multiple of STEP, B or more
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    top = tl.program_id(0) * ROWS
    aside = tl.program_id(1) * COLUMNS
    rows, columns, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
    inside_rows, inside_columns = top + rows < r, aside + columns < n
    # Where a tile begins may lie beyond 2^31 numbers; within it 32 bits do.
    own_left = left + tl.cast(top, tl.int64) * left_row
    own_right = right + aside
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PADDED, STEP):
        j = first + step
        at_left = own_left + (rows[:, None] * left_row + j[None, :] * left_column)
        at_right = own_right + (j[:, None] * right_stride + columns[None, :])
        a = tl.load(at_left, mask=inside_rows[:, None] & (j < B)[None, :], other=0.0)
        b = tl.load(at_right, mask=(j < B)[:, None] & inside_columns[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = later + (tl.cast(top, tl.int64) * later_stride + aside) + (rows[:, None] * later_stride + columns[None, :])
    inside = inside_rows[:, None] & inside_columns[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) - total, mask=inside)
