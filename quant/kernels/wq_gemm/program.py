"""The product for Triton: a program adds up `BN` rows of the weight times `BM` rows of x over its part of K, with tensor cores.

The weight is the left operand: its codes become floats in the registers in which tensor cores read them. Words are laid out so that a
lane finds the codes of its fragments in words of its own, and no code changes lanes. A code c of up to 7 bits becomes a 16-bit float
by putting its bits under those of 2^7 (bfloat16) or 2^10 (float16): the float is that power + c, exactly. Two codes lie 16 bits apart in
a word, so that one operation makes two.
"""

import triton
import triton.language as tl


@triton.jit
def in_order(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """`[ROWS, WIDTH]` words as `lines` has them loaded ▸ in the order of the rows, `[ROWS, 4, WIDTH // 4]`: lanes, words of a lane."""
    eights: tl.constexpr = ROWS // (16 * WARPS)
    apart = tl.permute(tl.reshape(tile, [eights, 2, WARPS, 8, WIDTH]), [0, 2, 1, 3, 4])
    return tl.reshape(apart, [ROWS, 4, WIDTH // 4])


@triton.jit
def lines(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Rows in the order in which they are loaded, so that warps find in their registers what they multiply: rows of 8 go to warps in turn,
    while a fragment has two times 8 rows that are neighbours."""
    place = tl.arange(0, ROWS)
    eight = place // 8
    return ((eight // (2 * WARPS) * WARPS + eight % WARPS) * 2 + eight // WARPS % 2) * 8 + place % 8


@triton.jit
def halves(words, ROWS: tl.constexpr, EACH: tl.constexpr):
    """`[ROWS, 4, 2 * EACH]` ▸ two of `[ROWS, 4, EACH]`."""
    return tl.split(tl.permute(tl.reshape(words, [ROWS, 4, 2, EACH]), [0, 1, 3, 2]))


@triton.jit
def pairs(words, ROWS: tl.constexpr, EACH: tl.constexpr, BITS: tl.constexpr):
    """`[ROWS, 4, EACH]` words ▸ `[ROWS, 4, EACH * 16 // BITS]`: pairs of codes, 16 bits apart, in the lowest bits; others above them."""
    count: tl.constexpr = 16 // BITS
    apart = tl.reshape(words, [ROWS, 4, EACH, 1]) >> (tl.arange(0, count) * BITS)[None, None, None, :]
    return tl.reshape(apart, [ROWS, 4, EACH * count])


@triton.jit
def floats(both, HALF: tl.constexpr):
    """int32 ▸ the two 16-bit floats in it."""
    kind: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    return both.to(tl.int16).to(kind, bitcast=True), (both >> 16).to(tl.int16).to(kind, bitcast=True)


@triton.jit
def twins(value, HALF: tl.constexpr):
    """The value as a 16-bit float, as two halves of one register, so that one operation does it to both codes of a pair."""
    bits = value.to(tl.float16 if HALF else tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return floats(bits | (bits << 16), HALF)


@triton.jit
def spread(values, ROWS: tl.constexpr, SCALES: tl.constexpr, EACH: tl.constexpr):
    """`[ROWS, SCALES]` ▸ `[ROWS, 4, SCALES * EACH]`: for each lane and pair."""
    return tl.reshape(tl.broadcast_to(values[:, None, :, None], [ROWS, 4, SCALES, EACH]), [ROWS, 4, SCALES * EACH])


@triton.jit
def operand(
    low, high, factor, other, magic, kind,
    BITS: tl.constexpr, ZEROS: tl.constexpr, OFFSETS: tl.constexpr, SCALED: tl.constexpr,
    BN: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """`[BN, WIDTH]`, as float16 or bfloat16: codes less `other` (`[BN, SCALES]`) or, without ZEROS, less 2^(BITS - 1), which is exact.
    Where SCALED is "operand", times `factor`, and with OFFSETS plus `other`, rounded.

    low: int32 `[BN, 4, words]`; high: `[BN, 4, pairs]`, the third bit of 3. magic: what the floats begin with, twice; an argument of the
    kernel, because an instruction holds one constant, and that is the mask."""
    half: tl.constexpr = kind == tl.float16
    words: tl.constexpr = WIDTH * (2 if BITS == 3 else BITS) // 128
    middle: tl.constexpr = 2.0 ** (BITS - 1)
    each: tl.constexpr = WIDTH // 8 // SCALES
    if BITS == 8:
        both = pairs(low, BN, words, 8)
        base = spread(8388608.0 + other.to(tl.float32), BN, SCALES, each) if ZEROS else 8388608.0 + middle
        one = ((both & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - base
        two = (((both >> 16) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - base
        if SCALED == "operand":
            scales = spread(factor.to(tl.float32), BN, SCALES, each)
            one, two = one * scales, two * scales
            if OFFSETS:
                plus = spread(other, BN, SCALES, each)
                one, two = one + plus, two + plus
    else:
        if BITS == 3:
            both = ((pairs(low, BN, words, 2) & 0x00030003) | magic) | ((high << 2) & 0x00040004)
        else:
            both = (pairs(low, BN, words, BITS) & (((1 << BITS) - 1) * 0x00010001)) | magic
        one, two = floats(both, half)
        power: tl.constexpr = 1024.0 if half else 128.0
        if ZEROS:
            less_one, less_two = twins(power + other.to(tl.float32), half)
            one, two = one - spread(less_one, BN, SCALES, each), two - spread(less_two, BN, SCALES, each)
        else:
            one, two = one - (power + middle), two - (power + middle)
        if SCALED == "operand":
            by_one, by_two = twins(factor, half)
            one, two = one * spread(by_one, BN, SCALES, each), two * spread(by_two, BN, SCALES, each)
            if OFFSETS:
                plus_one, plus_two = twins(other, half)
                one, two = one + spread(plus_one, BN, SCALES, each), two + spread(plus_two, BN, SCALES, each)
    # The columns of a pair are 8 pair + 2 lane + (0, 1).
    return tl.reshape(tl.permute(tl.join(one, two), [0, 2, 1, 3]), [BN, WIDTH]).to(kind)


@triton.jit
def added(
    total, low, high, factor, other, at_x, column, here, k, magic,
    BITS: tl.constexpr, ZEROS: tl.constexpr, OFFSETS: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """total `[BN, BM]` and the product of `COUNT` times `WIDTH` columns, from `column` on: halves of them, until one group is left.

    low and high: int32 `[BN, 4, words]`; high of 3 bits: `[BN, 4, pairs]`. factor and other: `[BN, COUNT * SCALES]`, or numbers."""
    if COUNT > 1:
        each: tl.constexpr = COUNT // 2 * WIDTH * (2 if BITS == 3 else BITS) // 128
        low_one, low_two = halves(low, BN, each)
        high_one, high_two, factor_one, factor_two, other_one, other_two = high, high, factor, factor, other, other
        if BITS == 3:
            high_one, high_two = halves(high, BN, COUNT // 2 * WIDTH // 8)
        few: tl.constexpr = COUNT // 2 * SCALES
        if SCALED != "end":
            factor_one, factor_two = tl.split(tl.permute(tl.reshape(factor, [BN, 2, few]), [0, 2, 1]))
        if ZEROS or OFFSETS:
            other_one, other_two = tl.split(tl.permute(tl.reshape(other, [BN, 2, few]), [0, 2, 1]))
        total = added(
            total, low_one, high_one, factor_one, other_one, at_x, column, here, k, magic,
            BITS, ZEROS, OFFSETS, SCALED, EVEN, BN, WIDTH, SCALES, COUNT // 2,
        )  # fmt: skip
        return added(
            total, low_two, high_two, factor_two, other_two, at_x, column + COUNT // 2 * WIDTH, here, k, magic,
            BITS, ZEROS, OFFSETS, SCALED, EVEN, BN, WIDTH, SCALES, COUNT // 2,
        )  # fmt: skip
    else:
        ahead = tl.arange(0, WIDTH)
        alive = here if EVEN else here & (column + ahead < k)[None, :]
        x = tl.load(at_x + (column + ahead)[None, :], mask=alive, other=0.0)
        codes = operand(low, high, factor, other, magic, x.dtype, BITS, ZEROS, OFFSETS, SCALED, BN, WIDTH, SCALES)
        if SCALED == "sums":
            total += tl.dot(codes, tl.trans(x)) * factor.to(tl.float32)
        else:
            total = tl.dot(codes, tl.trans(x), total)
        if OFFSETS and SCALED == "sums":
            total += other * tl.sum(x.to(tl.float32), 1)[None, :]
        return total


@triton.jit
def of_groups(values, column, own, k, rows, BLOCKS: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr):
    """`[BN, COUNT]`: of each row and `SPAN` columns, from `column` on."""
    group = tl.minimum(column + tl.arange(0, COUNT) * SPAN, k - 1) // 32 // BLOCKS
    return tl.load(values + group[None, :] * rows + own[:, None])


@triton.jit(do_not_specialize=["m", "units", "each", "magic"])
def gemm(
    low,  # int32 [panels, units, 16, 16]: words of 2, 4 or 8 bits a code; of 3 bits the lower two
    high,  # int32 [panels, units, 4, 16, 2]: the third bit of 3
    scale,  # [G, 16 * panels]
    other,  # [G, 16 * panels]: zeros as codes (ZEROS), or float32, what the middle code stands for (OFFSETS)
    x,  # [M, K]
    out,  # [M, N]
    sums,  # float32 [tiles, SPLIT, BM, BN]; not read where SPLIT is 1
    arrived,  # int32 [tiles], zeros before and after
    n,
    k,
    m,
    units,
    rows,  # 16 * panels
    each,  # units of a part of K
    magic,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,  # codes stand for 0; otherwise 2^(BITS - 1) does
    OFFSETS: tl.constexpr,
    SCALED: tl.constexpr,  # where a scale comes in: "operand", "sums" of each group, or at the "end"; the last not with OFFSETS
    EVEN: tl.constexpr,  # no unit ends beyond K
    BLOCKS: tl.constexpr,  # of 32 columns, that share a scale
    WIDTH: tl.constexpr,  # columns that are multiplied at once
    SCALES: tl.constexpr,  # that they have; 1 if not "operand"
    BN: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    step: tl.constexpr = 64 if BITS == 8 else 128 if BITS == 4 else 256
    count: tl.constexpr = step // WIDTH
    chunk: tl.constexpr = WARPS * 256
    span: tl.constexpr = WIDTH // SCALES
    scales: tl.constexpr = count * SCALES
    tile = tl.program_id(0)
    part = tl.program_id(2)
    line = tl.minimum(tile * BN + lines(BN, WARPS), rows - 1)
    word, few = tl.arange(0, 16), tl.arange(0, 8)
    at_low = low + (line // 16 * units * 256 + line % 16 * 16)[:, None] + word[None, :]
    at_high = high + (line // 16 * units * 128 + line % 16 * 2)[:, None] + (few // 2 * 32 + few % 2)[None, :]
    own = tl.minimum(tile * BN + tl.arange(0, BN), rows - 1)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    here = (row < m)[:, None]
    at_x = x + row[:, None] * k
    total = tl.zeros([BN, BM], tl.float32)
    begin = part * each
    end = tl.minimum(begin + each, units)
    # Scales and zeros are few, so that nothing but this loads them ahead: two steps.
    factor, zero = 0, 0
    next_factor, next_zero = 0, 0
    if SCALED != "end":
        factor = of_groups(scale, begin * step, own, k, rows, BLOCKS, span, scales)
        next_factor = of_groups(scale, (begin + 1) * step, own, k, rows, BLOCKS, span, scales)
    if ZEROS or OFFSETS:
        zero = of_groups(other, begin * step, own, k, rows, BLOCKS, span, scales)
        next_zero = of_groups(other, (begin + 1) * step, own, k, rows, BLOCKS, span, scales)
    for unit in tl.range(begin, end, num_stages=STAGES):
        words = in_order(tl.load(at_low + unit * 256), BN, 16, WARPS)
        third = words
        if BITS == 3:
            third = pairs(in_order(tl.load(at_high + unit * 128), BN, 8, WARPS), BN, 2, 1)
        later_factor, later_zero = factor, zero
        if SCALED != "end":
            later_factor = of_groups(scale, (unit + 2) * step, own, k, rows, BLOCKS, span, scales)
        if ZEROS or OFFSETS:
            later_zero = of_groups(other, (unit + 2) * step, own, k, rows, BLOCKS, span, scales)
        total = added(
            total, words, third, factor, zero, at_x, unit * step, here, k, magic,
            BITS, ZEROS, OFFSETS, SCALED, EVEN, BN, WIDTH, SCALES, count,
        )  # fmt: skip
        # Always the next: but the pipeliner takes no loop with a value that is only handed on.
        if SCALED != "end":
            factor = tl.where(unit < end, next_factor, later_factor)
            next_factor = later_factor
        if ZEROS or OFFSETS:
            zero = tl.where(unit < end, next_zero, later_zero)
            next_zero = later_zero
    if SCALED == "end":
        total = total * tl.load(scale + own).to(tl.float32)[:, None]
    wide = tile * BN + tl.arange(0, BN)
    if SPLIT == 1:
        inside = (wide < n)[:, None] & (row < m)[None, :]
        tl.store(out + (row[None, :] * n + wide[:, None]), total.to(out.dtype.element_ty), mask=inside)
    else:
        which = tl.program_id(1) * tl.num_programs(0) + tile
        parts = sums + which.to(tl.int64) * (SPLIT * BM * BN)
        tl.store(parts + part * (BM * BN) + (tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]), total)
        # Every thread's sums are written before one of them counts the program as arrived.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + which, 1, sem="acq_rel")
        if before == SPLIT - 1:
            # In the order of the parts, whichever came last: the same bits in every call.
            for start in range(0, BM * BN, chunk):
                flat = start + tl.arange(0, chunk)
                whole = tl.load(parts + flat, cache_modifier=".cg")
                for i in tl.static_range(1, SPLIT):
                    whole += tl.load(parts + i * (BM * BN) + flat, cache_modifier=".cg")
                to_row, to_column = tl.program_id(1) * BM + flat // BN, tile * BN + flat % BN
                tl.store(out + to_row * n + to_column, whole.to(out.dtype.element_ty), mask=(to_row < m) & (to_column < n))
            tl.store(arrived + which, 0)
