"""The transform for Triton: rows in registers, read and written once; codes of them are made before they leave.

A row is a matrix `[m, W]`, W = 2^k. Its columns are multiplied by the small factor while it is read. Each of k rounds then adds and
subtracts neighbours and puts the sums before the differences. That moves the bits of a position round by one, so that after the last round
every value is back in its place.
"""

import triton
import triton.language as tl

from quant.kernels.program_parts import code_of, grid_of, quotient


@triton.jit
def rounds(y, COUNT: tl.constexpr, W: tl.constexpr, LOG: tl.constexpr):
    for _ in tl.static_range(LOG):
        a, b = tl.split(tl.reshape(y, (COUNT, W // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (COUNT, W))
    return y


@triton.jit
def transform(
    x,  # [R, m W]
    out,  # [R, m W] like x; with CODES int8
    small,  # [m, m] in a type that products of x are made in, where M > 1
    scales,  # [R], with CODES
    zeros,  # [R]
    sums,  # int32 [R]: of what is stored
    rows,
    m,
    factor,
    clip,
    top,
    half,  # 2^(bits-1)
    M: tl.constexpr,  # the power of two that m is rounded up to
    W: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,  # that a program has
    STEP: tl.constexpr,  # columns of the small factor that are multiplied at a time
    CODES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FMA: tl.constexpr,  # which the interpreter has not
):
    own = tl.program_id(0).to(tl.int64) * ROWS
    n = m * W
    # Within a program's rows 32 bits hold an address.
    from_, to = x + own * n, out + own * n
    left_over = rows - own
    if M == 1:
        at = tl.arange(0, ROWS)[:, None] * W + tl.arange(0, W)[None, :]
        y = tl.load(from_ + at, mask=(tl.arange(0, ROWS) < left_over)[:, None], other=0.0)
        if y.dtype != tl.float64:
            y = y.to(tl.float32)
        y = rounds(y, ROWS, W, LOG)
    else:
        # Columns of the product are those of one row, then of the next.
        i = tl.arange(0, M)[:, None]
        k = tl.arange(0, STEP)
        column = tl.arange(0, ROWS * W)[None, :]
        y = tl.zeros([M, ROWS * W], tl.float32)
        for first in range(0, m, STEP):
            left = tl.load(small + i * m + first + k[None, :], mask=(i < m) & (first + k < m)[None, :], other=0.0)
            of = column // W * n + (first + k)[:, None] * W + column % W
            right = tl.load(from_ + of, mask=(first + k < m)[:, None] & (column // W < left_over), other=0.0)
            y = tl.dot(left, right.to(left.dtype), y, input_precision="ieee")
        y = rounds(tl.reshape(y, (M * ROWS, W)), M * ROWS, W, LOG)
        if ROWS > 1:
            y = tl.permute(tl.reshape(y, (M, ROWS, W)), (1, 0, 2))
    y = tl.reshape(y, (ROWS, M * W)) * factor
    each = tl.arange(0, ROWS)
    at = tl.arange(0, M * W)[None, :]
    there = (at < n) & (each < left_over)[:, None]
    if CODES:
        # As another kernel would read it.
        v = y.to(x.dtype.element_ty).to(tl.float32)
        low = tl.min(tl.where(at < n, v, float("inf")), 1)
        high = tl.max(tl.where(at < n, v, float("-inf")), 1)
        wrong = tl.sum((v != v).to(tl.int32), 1)
        s, z = grid_of(low * clip, high * clip, wrong, top, half, SYMMETRIC)
        inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
        tl.store(scales + own + each, s, mask=each < left_over)
        tl.store(zeros + own + each, z - half, mask=each < left_over)
        code = code_of(quotient(v, s[:, None] + tl.zeros_like(v), inverse[:, None], FMA), z[:, None], top)
        stored = (code - half).to(tl.int8)
        tl.store(to + each[:, None] * n + at, stored, mask=there)
        tl.store(sums + own + each, tl.sum(tl.where(at < n, stored, 0).to(tl.int32), 1), mask=each < left_over)
    else:
        tl.store(to + each[:, None] * n + at, y, mask=there)
