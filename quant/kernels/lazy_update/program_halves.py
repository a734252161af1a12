"""The update by halves for Triton: operands are split once into two parts of float16, in memory, and a tile of `later` takes three
products of parts."""

import triton
import triton.language as tl

from quant.kernels.lazy_update.program import take_off


@triton.jit
def split(
    left,  # float32 [R, B]
    right,  # float32 [B, N]
    left_parts,  # float16 [2 PADDED, *]: larger parts above smaller ones, B of PADDED rows and the others 0
    right_parts,
    left_back,  # float32 [R]
    right_back,  # float32 [N]
    r,
    n,
    left_row,
    left_column,
    right_stride,
    left_parts_stride,
    right_parts_stride,
    rights,  # programs that split `right`; the others split `left`
    B: tl.constexpr,
    PADDED: tl.constexpr,
    TALL: tl.constexpr,  # a power of two, PADDED or more
    WIDE: tl.constexpr,
):
    place = tl.program_id(0)
    if place < rights:
        _split(right, right_parts, right_back, place, n, right_stride, 1, right_parts_stride, B, PADDED, TALL, WIDE)
    else:
        _split(left, left_parts, left_back, place - rights, r, left_column, left_row, left_parts_stride, B, PADDED, TALL, WIDE)


@triton.jit
def _split(
    x, parts, back, tile, wide, step, across, parts_stride,
    B: tl.constexpr, PADDED: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x `[B, wide]`: its element (j, i) at j step + i across."""
    j = tl.arange(0, TALL)
    i = tl.arange(0, WIDE)
    alive = tile * WIDE + i < wide
    # Where a tile begins may lie beyond 2^31 numbers; within it 32 bits do.
    at = x + tl.cast(tile * WIDE, tl.int64) * across + (j[:, None] * step + i[None, :] * across)
    v = tl.load(at, mask=(j < B)[:, None] & alive[None, :], other=0.0)
    # By powers of two, exactly: the largest of a line becomes 2^14 or more, less than 2^15.
    exponent = tl.max(tl.abs(v), 0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    v = v * (exponent << 23).to(tl.float32, bitcast=True)[None, :]
    hi = v.to(tl.float16)
    lo = (v - hi.to(tl.float32)).to(tl.float16)
    to = parts + tile * WIDE + (j[:, None] * parts_stride + i[None, :])
    inside = (j < PADDED)[:, None] & alive[None, :]
    tl.store(to, hi, mask=inside)
    tl.store(to + PADDED * parts_stride, lo, mask=inside)
    tl.store(back + tile * WIDE + i, ((254 - exponent) << 23).to(tl.float32, bitcast=True), mask=alive)


@triton.jit(do_not_specialize=["r"])
def update_by_halves(
    later,  # float32 [R, N]
    left,  # float16 [2 PADDED, R]
    right,  # float16 [2 PADDED, N]
    left_back,  # float32 [R]
    right_back,  # float32 [N]
    r,
    n,
    later_stride,
    left_stride,
    right_stride,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Small products first: a tensor core cuts off bits of the sum whenever it adds to it.
    for product in tl.static_range(3):
        for first in range(0, PADDED, STEP):
            j = (first + tl.arange(0, STEP)).to(tl.int64)
            left_row = j + PADDED if product == 0 else j
            right_row = j + PADDED if product == 1 else j
            a = tl.load(left + (rows[:, None] + left_row[None, :] * left_stride), mask=(rows < r)[:, None], other=0.0)
            b = tl.load(right + (right_row[:, None] * right_stride + columns[None, :]), mask=(columns < n)[None, :], other=0.0)
            total = tl.dot(a, b, total)
    across = tl.load(right_back + columns, mask=columns < n, other=0.0)
    down = tl.load(left_back + rows, mask=rows < r, other=0.0)
    take_off(later, total * across[None, :] * down[:, None], r, n, later_stride, ROWS, COLUMNS)
