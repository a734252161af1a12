"""Some rows for Triton, which share what they are multiplied with."""

import triton
import triton.language as tl


@triton.jit
def sum_rows(
    bits,  # int32 [R, C]
    odd,  # int64 [C]
    out,  # int64 [R]
    r,
    c,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at a time
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = bits + rows[:, None].to(tl.int64) * c
    total = tl.zeros([ROWS, COLUMNS], tl.int64)
    for first in range(0, c, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        x = tl.load(own + columns[None, :], mask=(rows < r)[:, None] & (columns < c)[None, :], other=0)
        total += x.to(tl.int64) * tl.load(odd + columns, mask=columns < c, other=0)[None, :]
    tl.store(out + rows, tl.sum(total, 1), mask=rows < r)
