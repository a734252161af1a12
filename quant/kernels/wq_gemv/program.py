"""The product for Triton: a program makes the eight outputs of one tile for one row of x, from `UNITS` units of the layout at a time.

Other rows of x find the words in the cache. Sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def words_at(here, alive, WORDS: tl.constexpr):
    """The words that lanes have their codes in; the same three times where there is one."""
    one = tl.load(here, mask=alive, other=0)
    two = one
    three = one
    if WORDS == 3:
        two = tl.load(here + 64, mask=alive, other=0)
        three = tl.load(here + 128, mask=alive, other=0)
    return one, two, three


@triton.jit
def code_of(one, two, three, V: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Number V of a lane."""
    if WORDS == 1:
        return (one >> (V * BITS)) & ((1 << BITS) - 1)
    elif V < 10:
        return (one >> (3 * V)) & 7
    elif V < 20:
        return (two >> (3 * (V - 10))) & 7
    elif V < 30:
        return (three >> (3 * (V - 20))) & 7
    elif V == 30:
        return ((one >> 30) & 3) | (((three >> 30) & 1) << 2)
    else:
        return ((two >> 30) & 3) | (((three >> 31) & 1) << 2)


@triton.jit
def value_of(one, two, three, ranges, tile, column, groups, width, V: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    """What number V of a lane stands for, in each of a tile's eight rows; column: where its unit's codes of that number begin."""
    own = ranges + (tile * groups + tl.minimum(column // width, groups - 1)) * 16 + tl.arange(0, 8)[None, :, None]
    return code_of(one, two, three, V, BITS, WORDS).to(tl.float32) * tl.load(own) + tl.load(own + 8)


@triton.jit
def gemv(
    words,  # int32 [T, units, WORDS, 8, 8]
    ranges,  # float32 [T, G, 2, 8]
    x,  # float32 [M, K]
    out,  # float32 [M, N]
    n,
    k,
    units,
    groups,
    width,  # columns of a group
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,  # of a lane of a unit
    UNITS: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    eight = tl.arange(0, 8)
    lines, lanes = eight[None, :, None], eight[None, None, :]
    total = tl.zeros([UNITS, 8, 8], tl.float32)
    for first in range(0, units, UNITS):
        unit = (first + tl.arange(0, UNITS))[:, None, None]
        alive = unit < units
        here = words + (tile * units + unit) * (WORDS * 64) + lines * 8 + lanes
        one, two, three = words_at(here, alive, WORDS)
        for v in tl.static_range(CODES):
            column = unit * (CODES * 8) + v * 8
            given = tl.load(x + row * k + column + lanes, mask=column + lanes < k, other=0.0)
            total += value_of(one, two, three, ranges, tile, column, groups, width, v, BITS, WORDS) * given
    made = tl.sum(tl.sum(total, 2), 0)
    tl.store(out + row * n + tile * 8 + eight, made, mask=tile * 8 + eight < n)


@triton.jit
def weight(
    words,  # int32 [T, units, WORDS, 8, 8]
    ranges,  # float32 [T, G, 2, 8]
    out,  # [N, K]
    n,
    k,
    units,
    groups,
    width,  # columns of a group
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,  # of a lane of a unit
    UNITS: tl.constexpr,
):
    """The weight itself: `UNITS` units of the rows of a tile."""
    tile = tl.program_id(0)
    eight = tl.arange(0, 8)
    lines, lanes = eight[None, :, None], eight[None, None, :]
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None, None]
    alive = unit < units
    here = words + (tile * units + unit) * (WORDS * 64) + lines * 8 + lanes
    one, two, three = words_at(here, alive, WORDS)
    row = tile * 8 + lines
    to = out + row.to(tl.int64) * k
    for v in tl.static_range(CODES):
        column = unit * (CODES * 8) + v * 8
        value = value_of(one, two, three, ranges, tile, column, groups, width, v, BITS, WORDS)
        tl.store(to + column + lanes, value, mask=(row < n) & (column + lanes < k))
