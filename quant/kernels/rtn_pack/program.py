"""Groups for Triton, `[G, WIDTH]` of a flat weight. `whole_groups` holds ROWS groups in registers; `long_groups` reads one group twice, the
second time from a cache.

A tile is `[ROWS, PART]`: groups below each other. What a thread holds of a tile is of one group, and of all tiles of these groups, so that
few threads share a group: each of them computes its grid. PART is a multiple of 32, whose codes are whole words. Compiled without fused
multiply-adds, and divisions are rounded correctly or as if they were: results equal those of the reference bit for bit.
"""

import triton
import triton.language as tl

from quant.kernels.gptq_block.program import grid_of

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: sums with it have no bits for a fraction, and the last ones of their representation are the whole number."""
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def fused(x, y, z, FMA: tl.constexpr):
    """x y + z, rounded once. The interpreter has no such thing; float64 holds the products of 16-bit numbers here."""
    if FMA:
        return tl.fma(x, y, z)
    else:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)


@triton.jit
def lifted(v, scale, zero, inverse, top, GRID: tl.constexpr, FAST: tl.constexpr, FMA: tl.constexpr):
    """Values `[ROWS, PART]` ▸ int32: codes, and what `base` says on top of them. inverse: 1 / scale."""
    s = scale[:, None] + tl.zeros(v.shape, tl.float32)
    z = zero[:, None]
    if GRID == "kivi":
        q = tl.where(s == 0.0, 0.0, tl.div_rn(v - z, tl.where(s == 0.0, 1.0, s)))
        q = tl.minimum(tl.maximum(q, 0.0), top)
    elif GRID == "hqq":
        q = tl.minimum(tl.maximum(tl.div_rn(v, s) + z, 0.0), top)
    else:
        if FAST:
            # Of numbers of 11 bits a quotient is halfway between whole numbers or off by more than 2^-21 of itself. By the inverse it is
            # off by 2^-23; one step of Newton's leaves what is halfway there exactly.
            near = v * inverse[:, None]
            q = fused(fused(near * -1.0, s, v, FMA), inverse[:, None], near, FMA)
            if GRID == "omni":
                # Its scales have a bound, so that a quotient may be infinite.
                q = tl.where(tl.abs(near) < 2097152.0, q, near)
        else:
            q = tl.div_rn(v, s)
        # Bounds are whole: cutting before rounding is the same, and halves go to the even number before the zero is added.
        q = tl.minimum(tl.maximum(q, z * -1.0), top - z)
    return (q + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def base(zero, GRID: tl.constexpr):
    """int32: what the lifted code 0 of a group is."""
    if GRID == "kivi" or GRID == "hqq":
        return tl.full(zero.shape, ROUND_BITS, tl.int32)
    else:
        return zero.to(tl.int32) * -1 + ROUND_BITS


@triton.jit
def squares(lift, below, v, inside, scale, zero, GRID: tl.constexpr):
    """[ROWS]: Σ (w − ŵ)² of a tile."""
    code = (lift - below[:, None]).to(tl.float32)
    value = code * scale[:, None] + zero[:, None] if GRID == "kivi" else (code - zero[:, None]) * scale[:, None]
    off = tl.where(inside, value - v, 0.0)
    return tl.sum(off * off, 1)


@triton.jit
def put(
    lift,  # int32 [ROWS, PART]
    below,  # int32 [ROWS]
    codes,
    stream,
    start,  # of the first group's weights
    first,  # the tile's first column
    alive,  # [ROWS]
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,  # every tile is within its groups
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    STREAM: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    there = alive[:, None]
    if CODES:
        column = tl.arange(0, PART)[None, :]
        mask = there if WHOLE else there & (column < WIDTH - first)
        tl.store(codes + start + (row * WIDTH + first + column), (lift - below[:, None]).to(tl.uint8), mask=mask)
    if STREAM:
        if BITS == 1 or BITS == 2 or BITS == 4:
            shifted = tl.reshape(lift, [ROWS, PART // 8, 8]) << (tl.arange(0, 8) * BITS)[None, None, :]
            ones: tl.constexpr = ((1 << 8 * BITS) - 1) // ((1 << BITS) - 1)
            # Sums wrap around: what all codes have below them is taken away from the sum.
            word = tl.sum(shifted, 2) - (below * ones)[:, None]
            unit = tl.arange(0, PART // 8)[None, :]
            to = row * (WIDTH // 8) + first // 8 + unit
            mask = there if WHOLE else there & (unit < (WIDTH - first) // 8)
            if BITS == 4:
                tl.store(stream.to(tl.pointer_type(tl.int32)) + start // 8 + to, word, mask=mask)
            elif BITS == 2:
                tl.store(stream.to(tl.pointer_type(tl.int16)) + start // 8 + to, word.to(tl.int16), mask=mask)
            else:
                tl.store(stream + start // 8 + to, word.to(tl.uint8), mask=mask)
        else:
            # Four codes of 3 to 7 bits are one number; eight such numbers are BITS words.
            fours = tl.reshape(lift - below[:, None], [ROWS, PART // 4, 4]) << (tl.arange(0, 4) * BITS)[None, None, :]
            numbers = tl.reshape(tl.sum(fours, 2), [ROWS, PART // 32, 8])
            unit = tl.arange(0, PART // 32)[None, :]
            to = row * (WIDTH // 32) + first // 32 + unit
            mask = there if WHOLE else there & (unit < (WIDTH - first) // 32)
            for j in tl.static_range(BITS):
                up = tl.arange(0, 8) * (4 * BITS) - 32 * j
                high = numbers << tl.minimum(tl.maximum(up, 0), 31)[None, None, :]
                low = numbers >> tl.minimum(tl.maximum(up * -1, 0), 31)[None, None, :]
                some = tl.where(((up < 0) & (up > -32))[None, None, :], low, 0)
                some = tl.where(((up >= 0) & (up < 32))[None, None, :], high, some)
                tl.store(stream.to(tl.pointer_type(tl.int32)) + start // 32 * BITS + to * BITS + j, tl.sum(some, 2), mask=mask)


@triton.jit
def finished(low, high, total, scales, zeros, told, group, alive, top, steps, GRID: tl.constexpr, HALF: tl.constexpr):
    """Of groups `[ROWS]`: scale, zero and 1 / scale; what is stored of them is written."""
    scale, zero, unfit = grid_of(low, high, top, steps, GRID, HALF)
    tl.store(scales + group, scale.to(scales.dtype.element_ty), mask=alive)
    if GRID == "kivi" or GRID == "hqq":
        tl.store(zeros + group, zero.to(zeros.dtype.element_ty), mask=alive)
    else:
        tl.store(zeros + group, zero.to(tl.int32).to(zeros.dtype.element_ty), mask=alive)
    one = tl.full(scale.shape, 1, tl.int32)
    tl.atomic_add(told + one * 0, one, mask=(total - total != 0.0) & alive, sem="relaxed")
    if HALF:
        tl.atomic_add(told + one, one, mask=unfit & alive, sem="relaxed")
    return scale, zero, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def whole_groups(
    x,  # [G, WIDTH]
    codes,  # uint8 like x
    stream,  # uint8 [G WIDTH BITS / 8]
    scales,  # [G]
    zeros,  # [G]
    told,  # int32 [2]
    errors,  # [G], with ERROR
    groups,
    top,
    steps,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,  # PARTS PART >= WIDTH
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    CODES: tl.constexpr,
    STREAM: tl.constexpr,  # WIDTH is a multiple of 32
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    ERROR: tl.constexpr,
):
    # Of more weights than 2^31 the addresses before a program are large.
    group = tl.program_id(0).to(tl.int64) * ROWS
    start = group * WIDTH
    row = tl.arange(0, ROWS)
    alive = row < groups - group
    column = tl.arange(0, PART)[None, :]
    whole: tl.constexpr = PARTS * PART == WIDTH
    low = tl.full([ROWS, PART], float("inf"), tl.float32)
    high = tl.full([ROWS, PART], float("-inf"), tl.float32)
    total = tl.full([ROWS, PART], 0.0, tl.float32)
    held = ()
    for p in tl.static_range(PARTS):
        inside = alive[:, None] if whole else alive[:, None] & (column < WIDTH - p * PART)
        v = tl.load(x + start + (row[:, None] * WIDTH + p * PART + column), mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, v if whole else tl.where(inside, v, float("inf")))
        high = tl.maximum(high, v if whole else tl.where(inside, v, float("-inf")))
        total += v
        held = held + (v,)  # type: ignore[assignment]  # noqa: RUF005
    s, z, inverse = finished(
        tl.min(low, 1), tl.max(high, 1), tl.sum(total, 1), scales, zeros, told, group + row, alive, top, steps, GRID, HALF
    )
    if ERROR:
        off = tl.zeros([ROWS], tl.float32)
    for p in tl.static_range(PARTS):
        lift = lifted(held[p], s, z, inverse, top, GRID, FAST, FMA)
        if ERROR:
            off += squares(lift, base(z, GRID), held[p], column < WIDTH - p * PART, s, z, GRID)
        put(lift, base(z, GRID), codes, stream, start, p * PART, alive, ROWS, PART, WIDTH, whole, BITS, CODES, STREAM)
    if ERROR:
        tl.store(errors + group + row, off, mask=alive)


@triton.jit
def long_groups(
    x,
    codes,
    stream,
    scales,
    zeros,
    told,
    errors,
    top,
    steps,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,  # read at once
    HALF: tl.constexpr,
    CODES: tl.constexpr,
    STREAM: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    ERROR: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    start = group * WIDTH
    column = tl.arange(0, PART)[None, :]
    low = tl.full([1, PART], float("inf"), tl.float32)
    high = tl.full([1, PART], float("-inf"), tl.float32)
    total = tl.full([1, PART], 0.0, tl.float32)
    for first in range(0, WIDTH, PART):
        inside = column < WIDTH - first
        v = tl.load(x + start + first + column, mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(inside, v, float("inf")))
        high = tl.maximum(high, tl.where(inside, v, float("-inf")))
        total += v
    one = tl.arange(0, 1)
    s, z, inverse = finished(
        tl.min(low, 1), tl.max(high, 1), tl.sum(total, 1), scales, zeros, told, group + one, one == 0, top, steps, GRID, HALF
    )
    off = tl.zeros([1], tl.float32)
    for first in range(0, WIDTH, PART):
        v = tl.load(x + start + first + column, mask=column < WIDTH - first, other=0.0).to(tl.float32)
        lift = lifted(v, s, z, inverse, top, GRID, FAST, FMA)
        if ERROR:
            off += squares(lift, base(z, GRID), v, column < WIDTH - first, s, z, GRID)
        put(lift, base(z, GRID), codes, stream, start, first, one == 0, 1, PART, WIDTH, False, BITS, CODES, STREAM)
    if ERROR:
        tl.store(errors + group + one, off)
