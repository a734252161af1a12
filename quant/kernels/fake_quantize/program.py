"""One program a row: its range first, then its values, which registers still hold, or a cache where the row is long.

Compiled without fused multiply-adds but for those of `quotient`, and divisions are rounded correctly: results equal those of the reference
bit for bit.
"""

# Other ways of writing an assignment than these the compiler does not take.
# ruff: noqa: SIM108

import triton
import triton.language as tl

from quant.kernels.program_parts import grid_of, quotient, started


@triton.jit
def greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def values_at(x, row, first, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """A part of a row in float32; past its end the row's first value again, which changes no range."""
    at = first + tl.arange(0, BLOCK)
    own = x + row * n
    if WHOLE:
        return tl.load(own + at).to(tl.float32)
    else:
        return tl.load(own + at, mask=at < n, other=tl.load(own)).to(tl.float32)


@triton.jit
def range_of(v, SYMMETRIC: tl.constexpr, FMA: tl.constexpr):
    """Least, greatest, and a NaN where one is among them, else a number."""
    if not FMA:
        wrong = tl.where(tl.sum((v != v).to(tl.int32), 0) > 0, float("nan"), 0.0)
        return tl.min(v, 0), tl.max(v, 0), wrong
    elif SYMMETRIC:
        most = tl.reduce(tl.abs(v), 0, greater)
        return -most, most, most
    else:
        high = tl.reduce(v, 0, greater)
        return tl.min(v, 0), high, high


@triton.jit
def steps_of(v, s, inverse, least, most, FMA: tl.constexpr):
    """Whole steps from zero, as 1.5 * 2^23 more: a code less the zero, which lies in the number's lower bits."""
    inside = tl.minimum(tl.maximum(v, least), most)
    if FMA:
        # Where the inverse is no normal number, or s none at all, `quotient` is not exact.
        if s < 1e30:
            steps = quotient(inside, s, inverse, FMA)
        else:
            steps = tl.div_rn(inside, s)
    else:
        steps = tl.div_rn(inside, s)
    return steps + 12582912.0


@triton.jit
def written(
    v, out, at, n, s, z, inverse, least, most, half,
    SYMMETRIC: tl.constexpr, CODES: tl.constexpr, WHOLE: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """The codes that were written, int32."""
    steps = steps_of(v, s, inverse, least, most, FMA)
    codes = steps.to(tl.int32, bitcast=True) - 0x4B400000
    if not SYMMETRIC:
        codes += (z - half).to(tl.int32)
    if CODES:
        made = codes.to(tl.int8)
    else:
        made = (steps - 12582912.0) * s
    if WHOLE:
        tl.store(out + at, made)
        return codes
    else:
        tl.store(out + at, made, mask=at < n)
        return tl.where(at < n, codes, 0)


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
    ONCE: tl.constexpr,  # BLOCK is no less than n
    WHOLE: tl.constexpr,  # BLOCK divides n
    FMA: tl.constexpr,  # which the interpreter has not
    EARLY: tl.constexpr,
):
    started(EARLY)
    row = tl.program_id(0).to(tl.int64)
    v = values_at(x, row, 0, n, BLOCK, WHOLE)
    low, high, wrong = range_of(v, SYMMETRIC, FMA)
    if not ONCE:
        for first in range(BLOCK, n, BLOCK):
            low_here, high_here, wrong_here = range_of(values_at(x, row, first, n, BLOCK, WHOLE), SYMMETRIC, FMA)
            low = tl.minimum(low, low_here)
            high = tl.maximum(high, high_here)
            wrong = greater(wrong, wrong_here)
    s, z = grid_of(low * clip, high * clip, (wrong != wrong).to(tl.int32), top, half, SYMMETRIC)
    # What lies beyond these has the first or the last code, as they have: a product with s is off by far less than half a step. Finite, or
    # an infinity would have no quotient.
    least = tl.maximum(-z * s, -3.4028234663852886e38)
    most = tl.minimum((top - z) * s, 3.4028234663852886e38)
    inverse = tl.div_rn(1.0, s)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK if ONCE else n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        if not ONCE:
            v = values_at(x, row, first, n, BLOCK, WHOLE)
        total += written(v, out + row * n, at, n, s, z, inverse, least, most, half, SYMMETRIC, CODES, WHOLE, FMA)
    if CODES:
        tl.store(scales + row, s)
        tl.store(zeros + row, z - half)
        tl.store(sums + row, tl.sum(total, 0))
