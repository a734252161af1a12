"""The transform for Triton: rows in registers, read and written once.

Each of log n rounds adds and subtracts neighbours and puts the sums before the differences. That moves the bits of a position round by
one, so that after the last round every value is back in its place.
"""

import triton
import triton.language as tl


@triton.jit
def transform(x, out, rows, factor, N: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = own.to(tl.int64)[:, None] * N + tl.arange(0, N)[None, :]
    y = tl.load(x + at, mask=(own < rows)[:, None], other=0.0)
    if y.dtype != tl.float64:
        y = y.to(tl.float32)
    for _ in tl.static_range(LOG):
        a, b = tl.split(tl.reshape(y, (ROWS, N // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, N))
    tl.store(out + at, y * factor, mask=(own < rows)[:, None])
