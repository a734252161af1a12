"""The product for Triton: a program adds to 32 outputs of one row of x what the columns of one width give, `WORDS` words of each row at a
time."""

import triton
import triton.language as tl


@triton.jit
def entries(
    words,  # int32 [T, length, 32]
    values,  # float32 [count, 2^BITS]
    columns,  # int64 [count]
    x,  # float32 [M, K]
    out,  # float32 [M, N]
    n,
    k,
    count,
    length,
    BITS: tl.constexpr,
    CODES: tl.constexpr,  # of a word
    WORDS: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    lanes = tl.arange(0, 32)
    total = tl.zeros([WORDS, 32], tl.float32)
    for first in range(0, length, WORDS):
        place = first + tl.arange(0, WORDS)
        word = tl.load(words + (tile * length + place)[:, None] * 32 + lanes[None, :], mask=(place < length)[:, None], other=0)
        for j in tl.static_range(CODES):
            column = place * CODES + j
            inside = column < count
            given = tl.load(x + row * k + tl.load(columns + column, mask=inside, other=0), mask=inside, other=0.0)
            code = (word >> (j * BITS)) & ((1 << BITS) - 1)
            value = tl.load(values + column[:, None] * (1 << BITS) + code, mask=inside[:, None], other=0.0)
            total += value * given[:, None]
    alive = tile * 32 + lanes < n
    at = out + row * n + tile * 32 + lanes
    tl.store(at, tl.load(at, mask=alive, other=0.0) + tl.sum(total, 0), mask=alive)


@triton.jit
def apart(
    starts,  # int64 [N + 1]
    columns,  # int32 [weights kept aside]
    differences,  # float32
    x,  # float32 [M, K]
    out,  # float32 [M, N]
    n,
    k,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0)
    row = tl.program_id(1)
    last = tl.load(starts + line + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(starts + line), last, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < last
        given = tl.load(x + row * k + tl.load(columns + at, mask=inside, other=0), mask=inside, other=0.0)
        total += tl.load(differences + at, mask=inside, other=0.0) * given
    to = out + row * n + line
    tl.store(to, tl.load(to) + tl.sum(total, 0))


@triton.jit
def weight(
    words,  # int32 [T, length, 32]
    values,  # float32 [count, 2^BITS]
    columns,  # int64 [count]
    out,  # [N, K]
    n,
    k,
    count,
    length,
    BITS: tl.constexpr,
    CODES: tl.constexpr,  # of a word
    WORDS: tl.constexpr,
):
    """The columns of one width themselves: `WORDS` words of 32 rows."""
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    place = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    here = words + (tl.program_id(0) * length + place)[:, None] * 32 + tl.arange(0, 32)[None, :]
    word = tl.load(here, mask=(place < length)[:, None], other=0)
    to = out + row.to(tl.int64)[None, :] * k
    for j in tl.static_range(CODES):
        column = place * CODES + j
        inside = column < count
        code = (word >> (j * BITS)) & ((1 << BITS) - 1)
        value = tl.load(values + column[:, None] * (1 << BITS) + code, mask=inside[:, None], other=0.0)
        at = tl.load(columns + column, mask=inside, other=0)
        tl.store(to + at[:, None], value, mask=inside[:, None] & (row < n)[None, :])
