"""The lower triangle for Triton: a program adds one tile of it, from operands of 16 bits with sums in float32.

Tensor cores cut off bits of what they add to a large sum. `PROMOTE` steps of the tokens are therefore summed from zero, and that sum is
added to the total, which stays in memory, by an ordinary addition.
"""

import triton
import triton.language as tl


@triton.jit
def halves(x):
    """Columns of `[R, C]`, the first half and the second."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def to_total(total, which, part, quarter, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A quarter of a tile's columns at a time, or addresses would take the registers that the sums need."""
    # Read anew, so that where the tile lies is computed here and not held since the start.
    i = tl.load(which, volatile=True) * ROWS + tl.arange(0, ROWS)
    j = tl.load(which + 1, volatile=True) * COLUMNS + quarter * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    # Offsets of 32 bits, which K² does not exceed (`triton.MOST`).
    at = total + (i[:, None] * k + j[None, :])
    inside = (i < k)[:, None] & (j < k)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + part, mask=inside)


@triton.jit
def add_lower(
    total,  # float32 [K, K]
    x,  # [S, T, K]
    left_tiles,  # descriptor of x in blocks [1, STEP, ROWS], or anything where DESCRIBED is false
    right_tiles,  # the same in blocks [1, STEP, COLUMNS]
    tiles,  # int32 [programs, 2]: row and column of the program's tile
    sequences,
    length,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PROMOTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    which = tiles + 2 * tl.program_id(0)
    top, aside = tl.load(which) * ROWS, tl.load(which + 1) * COLUMNS
    rows, columns = top + tl.arange(0, ROWS), aside + tl.arange(0, COLUMNS)
    step = tl.arange(0, STEP)
    for s in range(0, sequences):
        for first in range(0, length, STEP * PROMOTE):
            tokens = x + (tl.zeros([], tl.int64) + s * length + first) * k
            part = tl.zeros([ROWS, COLUMNS], tl.float32)
            for i in range(0, PROMOTE):
                if DESCRIBED:
                    left = tl.trans(left_tiles.load([s, first + i * STEP, top]).reshape(STEP, ROWS))
                    right = right_tiles.load([s, first + i * STEP, aside]).reshape(STEP, COLUMNS)
                else:
                    t = i * STEP + step
                    alive = first + t < length
                    left = tl.load(tokens + (t[None, :] * k + rows[:, None]), mask=(rows < k)[:, None] & alive[None, :], other=0.0)
                    right = tl.load(tokens + (t[:, None] * k + columns[None, :]), mask=alive[:, None] & (columns < k)[None, :], other=0.0)
                part = tl.dot(left, right, part, input_precision=PRECISION)
            one, two = halves(part)
            for side in tl.static_range(2):
                half = one if side == 0 else two
                left_half, right_half = halves(half)
                to_total(total, which, left_half, 2 * side, k, ROWS, COLUMNS)
                to_total(total, which, right_half, 2 * side + 1, k, ROWS, COLUMNS)
