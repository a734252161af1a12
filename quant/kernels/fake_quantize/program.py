"""One program a row: its range first, then its values, which a cache still holds.

Compiled without fused multiply-adds, and divisions are rounded correctly: results equal those of the reference bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def rounded_half_to_even(x):
    # 1.5 * 2^23: a sum this large has no bits for a fraction. Beyond 2^22 every code is clamped anyway.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def grid_of(low, high, wrong, top, half, SYMMETRIC: tl.constexpr):
    """Least and greatest of rows, and how many of their values are no numbers ▸ scale, zero."""
    if SYMMETRIC:
        most = tl.maximum(-low, high)
        s = tl.where(most == 0.0, 1.0, tl.div_rn(tl.maximum(most, 1e-5), half - 1.0))
        z = half + tl.zeros_like(s)
    else:
        equal = low == high
        low = tl.where(equal, tl.minimum(low, 0.0), low)
        high = tl.where(equal, tl.maximum(high, 0.0), high)
        width = tl.minimum(tl.maximum(tl.div_rn(high - low, top), 1e-5), 1e4)
        s = tl.where((low == 0.0) & (high == 0.0), 1.0, width)
        z = rounded_half_to_even(tl.minimum(tl.maximum(tl.div_rn(-low, s), -1e4), 1e4))
    return tl.where(wrong > 0, float("nan"), s), z


@triton.jit
def code_of(quotient, z, top):
    code = rounded_half_to_even(quotient) + z
    # Not minimum and maximum: what is not a number stays so.
    code = tl.where(code < 0.0, 0.0, code)
    return tl.where(code > top, top, code)


@triton.jit
def round_rows(
    x,  # [R, n]
    out,  # [R, n] like x; with CODES int8
    scales,  # [R]
    zeros,  # [R]
    sums,  # int32 [R]: of what is stored, with CODES
    n,
    clip,
    top,
    half,  # 2^(bits-1)
    SYMMETRIC: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low = float("inf")
    high = float("-inf")
    wrong = 0
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        v = tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(at < n, v, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(at < n, v, float("-inf")), 0))
        wrong += tl.sum((v != v).to(tl.int32), 0)
    s, z = grid_of(low * clip, high * clip, wrong, top, half, SYMMETRIC)
    if CODES:
        tl.store(scales + row, s)
        tl.store(zeros + row, z - half)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        v = tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
        code = code_of(tl.div_rn(v, s), z, top)
        if CODES:
            stored = (code - half).to(tl.int8)
            tl.store(out + row * n + at, stored, mask=at < n)
            total += tl.where(at < n, stored, 0).to(tl.int32)
        else:
            tl.store(out + row * n + at, (code - z) * s, mask=at < n)
    if CODES:
        tl.store(sums + row, tl.sum(total, 0))
