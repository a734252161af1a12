"""A tile of `later` for Triton, minus a product over few columns, on tensor cores with nearly the accuracy of float32: in two forms."""

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


@triton.jit
def update_by_parts(
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
    PADDED: tl.constexpr,  # a power of two, B or more
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,  # of the parts that are multiplied: bfloat16, or float32 where that has no products
):
    a, b = operands(left, right, tl.arange(0, PADDED), r, n, left_row, left_column, right_stride, B, ROWS, COLUMNS)
    a_hi, a_mid, a_lo = parts(a, TYPE)
    b_hi, b_mid, b_lo = parts(b, TYPE)
    total = tl.dot(a_lo, b_hi, input_precision="ieee")
    total = tl.dot(a_mid, b_mid, total, input_precision="ieee")
    total = tl.dot(a_mid, b_hi, total, input_precision="ieee")
    total = tl.dot(a_hi, b_lo, total, input_precision="ieee")
    total = tl.dot(a_hi, b_mid, total, input_precision="ieee")
    total = tl.dot(a_hi, b_hi, total, input_precision="ieee")
    take_off(later, total, r, n, later_stride, ROWS, COLUMNS)


@triton.jit
def parts(x, TYPE: tl.constexpr):
    """Three numbers of bfloat16 whose sum x is."""
    hi = rounded(x)
    rest = x - hi
    mid = rounded(rest)
    return hi.to(TYPE), mid.to(TYPE), rounded(rest - mid).to(TYPE)


@triton.jit
def rounded(x):
    """To the nearest number of bfloat16, as float32."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
