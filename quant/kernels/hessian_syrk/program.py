"""The lower triangle for Triton: a program adds one tile of it, from operands of 16 bits with sums in float32.

Tensor cores cut off bits of what they add to a large sum. `PROMOTE` steps of the tokens are therefore summed from zero, and that sum is
added to the total by an ordinary addition.
"""

import triton
import triton.language as tl


@triton.jit
def add_lower(
    total,  # float32 [K, K]
    x,  # [S, T, K]
    tiles,  # int32 [programs, 2]: row and column of the program's tile
    sequences,
    length,
    k,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PROMOTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    which = tiles + 2 * tl.program_id(0)
    rows = tl.load(which) * TILE + tl.arange(0, TILE)
    columns = tl.load(which + 1) * TILE + tl.arange(0, TILE)
    # Offsets of 32 bits: those of 64 would take the registers that the sums need. K² is below 2^31 for K up to 46,340.
    at = rows[:, None] * k + columns[None, :]
    inside = (rows < k)[:, None] & (columns < k)[None, :]
    sums = tl.load(total + at, mask=inside, other=0.0)
    step = tl.arange(0, STEP)
    for s in range(0, sequences):
        for first in range(0, length, STEP * PROMOTE):
            tokens = x + (tl.zeros([], tl.int64) + s * length + first) * k
            part = tl.zeros([TILE, TILE], tl.float32)
            for i in range(0, PROMOTE):
                t = i * STEP + step
                alive = first + t < length
                left = tl.load(tokens + (t[None, :] * k + rows[:, None]), mask=(rows < k)[:, None] & alive[None, :], other=0.0)
                right = tl.load(tokens + (t[:, None] * k + columns[None, :]), mask=alive[:, None] & (columns < k)[None, :], other=0.0)
                part = tl.dot(left, right, part, input_precision=PRECISION)
            sums += part
    tl.store(total + at, sums, mask=inside)
