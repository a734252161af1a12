"""The product for Triton: a program adds up one tile of out, or one after another, and turns the sums into float32 itself.

Both operands lie with the columns that are summed up next to each other, as tensor cores take 8-bit integers; the weight's tile is read
like that of x and used transposed.
"""

import triton
import triton.language as tl


# Compiled once for all numbers of rows.
@triton.jit(do_not_specialize=["m"])
def multiply(
    x,  # int8 [M, K], or its descriptor in tiles [ROWS, STEP]
    weight,  # int8 [N, K], or its descriptor in tiles [COLUMNS, STEP]
    out,  # [M, N]
    row_scale,  # float32 [M]
    row_zero,  # float32 [M], read with ROW_ZERO
    row_sums,  # int32 [M]: of the codes of x; read with ZERO
    scale,  # float32 [N]
    zero,  # float32 [N], read with ZERO
    sums,  # float32 [N]: of codes - zero of the weight; read with ROW_ZERO
    m,
    n,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,  # rows of tiles that are gone through together, so that their operands stay in a cache
    DESCRIPTORS: tl.constexpr,
    WHOLE: tl.constexpr,  # STEP divides k
    ZERO: tl.constexpr,
    ROW_ZERO: tl.constexpr,
    STAY: tl.constexpr,  # there are fewer programs than tiles
):
    if STAY:
        tiles = tl.cdiv(m, ROWS) * tl.cdiv(n, COLUMNS)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                index, x, weight, out, row_scale, row_zero, row_sums, scale, zero, sums, m, n, k,
                ROWS, COLUMNS, STEP, GROUP, DESCRIPTORS, WHOLE, ZERO, ROW_ZERO,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, weight, out, row_scale, row_zero, row_sums, scale, zero, sums, m, n, k,
            ROWS, COLUMNS, STEP, GROUP, DESCRIPTORS, WHOLE, ZERO, ROW_ZERO,
        )  # fmt: skip


@triton.jit
def _tile(
    index, x, weight, out, row_scale, row_zero, row_sums, scale, zero, sums, m, n, k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WHOLE: tl.constexpr, ZERO: tl.constexpr, ROW_ZERO: tl.constexpr,
):  # fmt: skip
    across = GROUP * tl.cdiv(n, COLUMNS)
    top = index // across * GROUP
    high = tl.minimum(tl.cdiv(m, ROWS) - top, GROUP)
    first_row = (top + index % across % high) * ROWS
    first_column = (index % across // high) * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.int32)
    if DESCRIPTORS:
        # What lies outside is read as 0.
        for first in range(0, k, STEP):
            left = x.load([first_row, first])
            right = weight.load([first_column, first])
            total = tl.dot(left, right.T, total, out_dtype=tl.int32)
    else:
        step = tl.arange(0, STEP)
        # Rows beyond the last are read again from the first on; they are not stored.
        left_at = (first_row + tl.arange(0, ROWS)).to(tl.int64) % m * k
        right_at = (first_column + tl.arange(0, COLUMNS)).to(tl.int64) % n * k
        lefts = x + (left_at[:, None] + step[None, :])
        rights = weight + (right_at[:, None] + step[None, :])
        for first in range(0, k, STEP):
            if WHOLE:
                left = tl.load(lefts)
                right = tl.load(rights)
            else:
                inside = (step < k - first)[None, :]
                left = tl.load(lefts, mask=inside, other=0)
                right = tl.load(rights, mask=inside, other=0)
            total = tl.dot(left, right.T, total, out_dtype=tl.int32)
            lefts += STEP
            rights += STEP
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    product = total.to(tl.float32)
    if ZERO:
        added = tl.load(row_sums + rows, mask=rows < m, other=0).to(tl.float32)
        product -= added[:, None] * tl.load(zero + columns, mask=columns < n, other=0.0)[None, :]
    if ROW_ZERO:
        of_rows = tl.load(row_zero + rows, mask=rows < m, other=0.0)
        product -= of_rows[:, None] * tl.load(sums + columns, mask=columns < n, other=0.0)[None, :]
    product *= tl.load(row_scale + rows, mask=rows < m, other=0.0)[:, None]
    product *= tl.load(scale + columns, mask=columns < n, other=0.0)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out + at, product.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])
