"""The block for Triton: a program holds `ROWS` rows of the weight with all their columns and goes through the columns one by one.

The rows of a program need no others, so that linears and configurations stacked along them change nothing. Compiled without fused
multiply-adds, and divisions are rounded correctly: results equal those of the reference bit for bit.
"""

import triton
import triton.language as tl

WHOLE, FLOAT, MINIMUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def nearest_whole(x):
    """Halves to even. Beyond 2^21 x is cut: it is far outside the codes of 8 bits, with any zero of 16 bits."""
    x = tl.minimum(tl.maximum(x, -2097152.0), 2097152.0)
    # 1.5 * 2^23 and 1.5 * 2^52: sums this large have no bits for a fraction.
    if x.dtype == tl.float64:
        return (x + 6755399441055744.0) - 6755399441055744.0
    else:
        return (x + 12582912.0) - 12582912.0


@triton.jit
def divided(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def grid_of(low, high, top, steps, GRID: tl.constexpr, HALF: tl.constexpr):
    """Least and greatest of groups ▸ scale, zero, and where float16 cannot hold them."""
    if GRID == "g_asym":
        a = tl.minimum(low, 0.0)
        b = tl.maximum(high, 0.0)
        empty = (a == 0.0) & (b == 0.0)
        a = tl.where(empty, -1.0, a)
        b = tl.where(empty, 1.0, b)
    elif GRID == "g_sym":
        most = tl.maximum(low * -1.0, high)
        signed = (low < 0.0) | (most == 0.0)
        b = tl.where(most == 0.0, 1.0, most)
        a = tl.where(signed, b * -1.0, 0.0)
    elif GRID == "q_sym" or GRID == "absmax":
        b = tl.maximum(low * -1.0, high)
        a = b * -1.0
    elif GRID == "omni":
        a = tl.where(low == high, tl.minimum(low, 0.0), low)
        b = tl.where(low == high, tl.maximum(high, 0.0), high)
    else:
        a = low
        b = high
    if GRID == "q_sym":
        step = tl.div_rn(b, steps)
    elif GRID == "absmax":
        step = tl.div_rn(tl.maximum(b, 1e-5), steps)
    elif GRID == "awq_asym":
        step = tl.div_rn(tl.maximum(b - a, 1e-5), steps)
    elif GRID == "omni":
        step = tl.minimum(tl.maximum(tl.div_rn(b - a, steps), 1e-5), 1e4)
    elif GRID == "hqq":
        flat = b - a <= 1e-4
        one = tl.full(a.shape, 1.0, tl.float32)
        inverse = tl.minimum(tl.div_rn(one, tl.where(flat, 1.0, b - a)) * steps, 2e4)
        step = tl.div_rn(one, tl.where(flat, 1.0, inverse))
    else:
        step = tl.div_rn(b - a, steps)
    scale = tl.where((a == 0.0) & (b == 0.0), 1.0, step)
    if HALF:
        scale = scale.to(tl.float16).to(tl.float32)
    if GRID == "kivi":
        zero = a
    elif GRID == "hqq":
        zero = tl.div_rn(a * -1.0, scale)
    elif GRID == "omni":
        zero = nearest_whole(tl.minimum(tl.maximum(tl.div_rn(a * -1.0, scale), -1e4), 1e4))
    elif GRID == "g_asym" or GRID == "awq_asym":
        zero = tl.minimum(tl.maximum(nearest_whole(tl.div_rn(a * -1.0, scale)), 0.0), top)
    else:
        zero = tl.full(a.shape, 0.0, tl.float32) + (top + 1.0) * 0.5
    if HALF and (GRID == "kivi" or GRID == "hqq"):
        zero = zero.to(tl.float16).to(tl.float32)
    # 2^-24 (top + 1): `quant.grids.unfit_float16`.
    right = (scale >= (top + 1.0) * 5.9604644775390625e-08) & (scale < float("inf"))
    if GRID == "kivi":
        right = right | ((scale == 0.0) & (low == high))
        right = right & ((tl.abs(zero) <= 512.0 * scale) | (scale == 0.0)) & (tl.abs(zero) < float("inf"))
    elif GRID == "hqq":
        right = right & (tl.abs(zero) <= 512.0)
    return scale, zero, right == 0


@triton.jit
def told(scale, zero, odd, mine, low, high, top, GRIDS: tl.constexpr, NUMBER: tl.constexpr, GRID: tl.constexpr):
    """`grid_of` of those rows whose grid this is. GRIDS: two bits for each number of a grid, float32 and float16, where rows have them."""
    steps = (top + 1.0) * 0.5 - 1.0 if GRID == "q_sym" or GRID == "absmax" else top
    if GRIDS >> 2 * NUMBER & 1:
        s, z, _ = grid_of(low, high, top, steps, GRID, False)
        here = mine == 2 * NUMBER
        scale = tl.where(here, s, scale)
        zero = tl.where(here, z, zero)
        if GRID == "hqq" or GRID == "kivi":
            odd = odd | (here & (low == 0.0))
    if GRIDS >> 2 * NUMBER + 1 & 1:
        s, z, unfit = grid_of(low, high, top, steps, GRID, True)
        here = mine == 2 * NUMBER + 1
        scale = tl.where(here, s, scale)
        zero = tl.where(here, z, zero)
        odd = odd | (here & unfit)
        if GRID == "hqq" or GRID == "kivi":
            odd = odd | (here & (low == 0.0))
    return scale, zero, odd


@triton.jit
def find(tile, word, first, b, GRIDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each row of a tile `[ROWS, COLUMNS]`, scale and zero of the group that has column `first`; and whether it is odd, once for each
    group. word: see `quant.kernels.gptq_block.Fits`."""
    width = tl.maximum(word >> 8, 1)
    start = first // width * width
    columns = tl.arange(0, COLUMNS)
    own = (columns[None, :] >= start[:, None]) & (columns[None, :] < (start + width)[:, None]) & (columns < b)[None, :]
    low = tl.min(tl.where(own, tile, float("inf")), 1)
    high = tl.max(tl.where(own, tile, float("-inf")), 1)
    # Least and greatest of a group with NaN may be numbers.
    sums = tl.sum(tl.where(own, tile * 0.0, 0.0), 1)
    top = ((2 << (word & 7)) - 1).to(tl.float32)
    mine = (word >> 4 & 7) * 2 + (word >> 3 & 1)
    scale = low
    zero = low
    odd = sums != 0.0
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 0, "g_asym")
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 1, "g_sym")
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 2, "awq_asym")
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 3, "omni")
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 4, "q_sym")
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 5, "hqq")
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 6, "kivi")
    scale, zero, odd = told(scale, zero, odd, mine, low, high, top, GRIDS, 7, "absmax")
    return scale, zero, odd & (start == first)


@triton.jit
def solve(
    block,  # [B, N]
    upper,  # [B, B]
    scale,  # [G, N]
    zero,  # [G, N]
    tops,  # [N], read where EACH: largest code of each row
    group,  # int32 [B]
    words,  # int32 [N], read where GRIDS: how each row's ranges are found, which are then written to scale and zero
    odd,  # int32 [1], added to where GRIDS
    codes,  # uint8 [B, N]
    values,
    errors,
    n,
    b,
    top,  # of all rows, where not EACH
    EACH: tl.constexpr,
    KIND: tl.constexpr,
    GRIDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    alive = rows < n
    most = tl.load(tops + rows, mask=alive, other=0.0) if EACH else top
    tile = tl.load(block + columns[None, :] * n + rows[:, None], mask=alive[:, None] & (columns < b)[None, :], other=0.0)
    if GRIDS:
        word = tl.load(words + rows, mask=alive, other=0)
        wrong = tl.zeros([ROWS], tl.int32)
        before = -1
        for j in range(0, b):
            g = tl.load(group + j)
            if g != before:
                s, z, bad = find(tile, word, j, b, GRIDS, COLUMNS)
                found = alive & (word > 0)
                tl.store(scale + g * n + rows, s, mask=found)
                tl.store(zero + g * n + rows, z, mask=found)
                wrong += (bad & found).to(tl.int32)
            before = g
        tl.atomic_add(odd, tl.sum(wrong, 0))
        # What one thread stored another loads.
        tl.debug_barrier()
    for j in range(0, b):
        # A tile in registers has no columns to index: the others are masked out of a sum.
        x = tl.sum(tl.where((columns == j)[None, :], tile, 0.0), 1)
        own = tl.load(group + j) * n + rows
        s = tl.load(scale + own, mask=alive, other=1.0)
        z = tl.load(zero + own, mask=alive, other=0.0)
        if KIND == MINIMUM:
            flat = s == 0.0
            steps = tl.where(flat, 0.0, divided(x - z, tl.where(flat, 1.0, s)))
            code = nearest_whole(tl.minimum(tl.maximum(steps, 0.0), most))
            q = code * s + z
        else:
            code = nearest_whole(divided(x, s) + z) if KIND == FLOAT else nearest_whole(divided(x, s)) + z
            code = tl.minimum(tl.maximum(code, 0.0), most)
            q = (code - z) * s
        error = divided(x - q, tl.load(upper + j * b + j))
        at = j * n + rows
        tl.store(codes + at, code.to(tl.uint8), mask=alive)
        tl.store(values + at, q, mask=alive)
        tl.store(errors + at, error, mask=alive)
        later = tl.load(upper + j * b + columns, mask=(columns > j) & (columns < b), other=0.0)
        tile = tile - error[:, None] * later[None, :]
