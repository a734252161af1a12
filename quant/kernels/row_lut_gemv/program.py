"""The product for Triton: a program has 32 outputs of one row of x, and goes through `COLUMNS` columns at a time."""

import triton
import triton.language as tl


@triton.jit
def values_of(words, tables, tile, column, k, units, BITS: tl.constexpr):
    """float32 [COLUMNS, 32]: of a tile's rows; something for columns that there are not."""
    lanes = tl.arange(0, 32)
    inside = (column < k)[:, None]
    at = column % 32 * BITS
    here = words + ((tile * units + column // 32) * BITS + at // 32)[:, None] * 32 + lanes[None, :]
    shift = (at % 32)[:, None]
    code = tl.load(here, mask=inside, other=0) >> shift
    if BITS == 3:  # a code may lie in two words; the first one's sign was repeated
        two = shift + BITS > 32
        code = tl.where(two, code & 3 >> shift - 30, code)
        code |= tl.load(here + 32, mask=inside & two, other=0) << tl.where(two, 32 - shift, 0)
    code &= (1 << BITS) - 1
    return tl.load(tables + (tile * (1 << BITS) + code) * 32 + lanes[None, :]).to(tl.float32)


@triton.jit
def rows(
    words,  # int32 [T, units, BITS, 32]
    tables,  # float16 or float32 [T, 2^BITS, 32]
    x,  # float32 [M, K]
    out,  # float32 [M, N]
    n,
    k,
    units,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    total = tl.zeros([COLUMNS, 32], tl.float32)
    for first in range(0, k, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        given = tl.load(x + row * k + column, mask=column < k, other=0.0)
        total += values_of(words, tables, tile, column, k, units, BITS) * given[:, None]
    line = tile * 32 + tl.arange(0, 32)
    tl.store(out + row * n + line, tl.sum(total, 0), mask=line < n)


@triton.jit
def weight(
    words,  # int32 [T, units, BITS, 32]
    tables,  # float16 or float32 [T, 2^BITS, 32]
    out,  # [N, K]
    n,
    k,
    units,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The weight itself: `COLUMNS` columns of 32 rows."""
    tile = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    line = tile * 32 + tl.arange(0, 32)
    to = out + line.to(tl.int64)[None, :] * k + column[:, None]
    tl.store(to, values_of(words, tables, tile, column, k, units, BITS), mask=(column < k)[:, None] & (line < n)[None, :])
