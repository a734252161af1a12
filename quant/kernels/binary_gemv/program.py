"""The product for Triton: a program makes the eight outputs of one tile for one row of x, from `UNITS` units of columns at a time."""

import triton
import triton.language as tl


@triton.jit
def signs(
    words,  # int32 [T, units, 1, 8, 8]
    tables,  # float32 [T, blocks, 8, 8]
    salient,  # int32 [units * 128]
    x,  # float32 [M, K]
    out,  # float32 [M, N]
    n,
    k,
    units,
    blocks,
    block,  # columns of one
    UNITS: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    eight = tl.arange(0, 8)
    lines, lanes = eight[None, :, None], eight[None, None, :]
    total = tl.zeros([UNITS, 8, 8], tl.float32)
    for first in range(0, units, UNITS):
        unit = (first + tl.arange(0, UNITS))[:, None, None]
        word = tl.load(words + (tile * units + unit) * 64 + lines * 8 + lanes, mask=unit < units, other=0)
        for v in tl.static_range(16):
            column = unit * 128 + v * 8
            inside = column + lanes < k
            entry = ((word >> (2 * v)) & 3) + tl.load(salient + column + lanes, mask=inside, other=0)
            own = tables + (tile * blocks + tl.minimum(column // block, blocks - 1)) * 64 + lines * 8
            given = tl.load(x + row * k + column + lanes, mask=inside, other=0.0)
            total += tl.load(own + entry) * given
    made = tl.sum(tl.sum(total, 2), 0)
    tl.store(out + row * n + tile * 8 + eight, made, mask=tile * 8 + eight < n)


@triton.jit
def weight(
    words,  # int32 [T, units, 1, 8, 8]
    tables,  # float32 [T, blocks, 8, 8]
    salient,  # int32 [units * 128]
    out,  # [N, K]
    n,
    k,
    units,
    blocks,
    block,  # columns of one
    UNITS: tl.constexpr,
):
    """The weight itself: `UNITS` units of the rows of a tile."""
    tile = tl.program_id(0)
    eight = tl.arange(0, 8)
    lines, lanes = eight[None, :, None], eight[None, None, :]
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None, None]
    word = tl.load(words + (tile * units + unit) * 64 + lines * 8 + lanes, mask=unit < units, other=0)
    row = tile * 8 + lines
    to = out + row.to(tl.int64) * k
    for v in tl.static_range(16):
        column = unit * 128 + v * 8
        inside = column + lanes < k
        entry = ((word >> (2 * v)) & 3) + tl.load(salient + column + lanes, mask=inside, other=0)
        own = tables + (tile * blocks + tl.minimum(column // block, blocks - 1)) * 64 + lines * 8
        tl.store(to + column + lanes, tl.load(own + entry), mask=(row < n) & inside)
