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
def solve(
    block,  # [B, N]
    upper,  # [B, B]
    scale,  # [G, N]
    zero,  # [G, N]
    tops,  # [N], read where EACH: largest code of each row
    group,  # int32 [B]
    codes,  # [B, N]
    values,
    errors,
    n,
    b,
    top,  # of all rows, where not EACH
    EACH: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    alive = rows < n
    most = tl.load(tops + rows, mask=alive, other=0.0) if EACH else top
    tile = tl.load(block + columns[None, :] * n + rows[:, None], mask=alive[:, None] & (columns < b)[None, :], other=0.0)
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
        tl.store(codes + at, code, mask=alive)
        tl.store(values + at, q, mask=alive)
        tl.store(errors + at, error, mask=alive)
        later = tl.load(upper + j * b + columns, mask=(columns > j) & (columns < b), other=0.0)
        tile = tile - error[:, None] * later[None, :]
