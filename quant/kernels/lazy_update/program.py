"""A tile of `later` for Triton, minus a product over few columns, on tensor cores with nearly the accuracy of float32."""

import triton
import triton.language as tl


@triton.jit
def operands(left, right, j, r, n, left_row, left_column, right_stride, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program's tile, at the block's columns j: zeros where there are none."""
    top = tl.program_id(0) * ROWS
    aside = tl.program_id(1) * COLUMNS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # Where a tile begins may lie beyond 2^31 numbers; within it 32 bits do.
    at_left = left + tl.cast(top, tl.int64) * left_row + (rows[:, None] * left_row + j[None, :] * left_column)
    at_right = right + aside + (j[:, None] * right_stride + columns[None, :])
    a = tl.load(at_left, mask=(top + rows < r)[:, None] & (j < B)[None, :], other=0.0)
    b = tl.load(at_right, mask=(j < B)[:, None] & (aside + columns < n)[None, :], other=0.0)
    return a, b


@triton.jit
def take_off(later, total, r, n, later_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    top = tl.program_id(0) * ROWS
    aside = tl.program_id(1) * COLUMNS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = later + (tl.cast(top, tl.int64) * later_stride + aside) + (rows[:, None] * later_stride + columns[None, :])
    inside = (top + rows < r)[:, None] & (aside + columns < n)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) - total, mask=inside)


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
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PADDED, STEP):
        j = first + tl.arange(0, STEP)
        a, b = operands(left, right, j, r, n, left_row, left_column, right_stride, B, ROWS, COLUMNS)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    take_off(later, total, r, n, later_stride, ROWS, COLUMNS)
