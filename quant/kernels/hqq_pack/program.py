"""A half-quadratic step for Triton, value by value. Compiled without fused multiply-adds, and divisions are rounded correctly: results are
those of torch bit for bit."""

import triton
import triton.language as tl

from quant.kernels.program_parts import rounded_half_to_even


@triton.jit
def step(
    x,  # [G, width]
    scales,  # [G]
    zeros,  # [G]
    moved,  # like x: codes less x / scale
    size,  # like x: |x - x̂|
    large,  # int32 [1], 0 before: 1 where an error is larger than known
    count,  # of values
    width,
    top,
    known,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    v = tl.load(x + at, mask=there, other=0.0)
    s = tl.load(scales + at // width, mask=there, other=1.0)
    z = tl.load(zeros + at // width, mask=there, other=0.0)
    steps = tl.div_rn(v, s)
    # Bounds are whole: cutting before rounding is the same.
    code = rounded_half_to_even(tl.minimum(tl.maximum(steps + z, 0.0), top))
    error = tl.abs(v - (code - z) * s)
    tl.store(moved + at, code - steps, mask=there)
    tl.store(size + at, error, mask=there)
    tl.atomic_max(large, tl.max((there & (error > known)).to(tl.int32), 0), sem="relaxed")
