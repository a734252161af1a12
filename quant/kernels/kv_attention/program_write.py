"""What writes KIVI's cache, for Triton: a prompt, or a step's token, in one launch. Bits are those that `kv_attention`'s torch writes.

A program has one sequence and KV head. Tokens of a head are rows of D channels; words and ranges as `Packed` has them, a range one int32.
"""

# A tuple grows under its name here, which types do not know and other ways of writing it the compiler.
# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from quant.kernels.program_parts import quotient, rounded_half_to_even, started


@triton.jit
def ranges_of(x, AXIS: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Step and low as they are stored, float32, and both in an int32, the step lower."""
    low = tl.min(x, AXIS)
    width = tl.max(x, AXIS) - low
    TOP: tl.constexpr = (1 << BITS) - 1
    # By a number of the host's torch divides on a CPU, and on a GPU multiplies by the inverse.
    step = (tl.div_rn(width, TOP + tl.zeros_like(width)) if PLAIN else width * (1.0 / TOP)).to(tl.float16)
    least = low.to(tl.float16)
    both = least.to(tl.int16, bitcast=True).to(tl.int32) << 16 | (step.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    return step.to(tl.float32), least.to(tl.float32), both


@triton.jit
def inverse_of(step, PLAIN: tl.constexpr):
    """1 / step, rounded correctly: one Newton step from a quotient that is off by two units at most does it for every float16 above 0."""
    if PLAIN:
        return tl.div_rn(1.0 + tl.zeros_like(step), step)
    else:
        near = 1.0 / step
        return tl.fma(tl.fma(-near, step, 1.0 + tl.zeros_like(step)), near, near)


@triton.jit
def codes_of(x, step, low, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """int32, as `Affine.encode` with the group's minimum. step and low as they broadcast. An infinite step makes codes of 0, there too."""
    whole = tl.where(step == 0.0, 1.0, step)
    code = quotient(x - low, whole + tl.zeros_like(x), inverse_of(whole, PLAIN), not PLAIN)
    code = tl.minimum(tl.maximum(code, 0.0), 1.0 * ((1 << BITS) - 1))
    return tl.where(step == 0.0, 0.0, rounded_half_to_even(code)).to(tl.int32)


@triton.jit
def write_keys(
    x, row, words, ranges,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, FIELD: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """A block's tokens, which start at x + row [G]; words [G, W], ranges [D]."""
    token = tl.arange(0, G)
    for first in range(0, W, PIECE):
        column = first + tl.arange(0, PIECE)
        made = tl.zeros([G, PIECE], tl.int32)
        # Unrolled, it would take more registers than there are.
        for j in range(D // W):
            held = tl.load(x + row[:, None] + (j * W + column)[None, :]).to(tl.float32)
            step, low, both = ranges_of(held, 0, BITS, PLAIN)
            tl.store(ranges + j * W + column, both)
            made |= codes_of(held, step[None, :], low[None, :], BITS, PLAIN) << (j * FIELD)
        tl.store(words + token[:, None] * W + column[None, :], made.to(tl.int16))


@triton.jit
def write_values(
    x, row, words, ranges, inside, alive,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, FIELD: tl.constexpr, W: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Tokens that start at x + row [N], to places `inside` [N] of a block: words [W, G], ranges [D / G, G]. alive [N]: those written."""
    group = tl.arange(0, G)
    steps = ()
    lows = ()
    for g in tl.static_range(D // G):
        held = tl.load(x + row[:, None] + (g * G + group)[None, :], mask=alive[:, None], other=0.0).to(tl.float32)
        step, low, both = ranges_of(held, 1, BITS, PLAIN)
        tl.store(ranges + g * G + inside, both, mask=alive)
        steps = steps + (step,)
        lows = lows + (low,)
    PIECE: tl.constexpr = min(G, W)
    for i in tl.static_range(W // PIECE):
        word = i * PIECE + tl.arange(0, PIECE)
        made = tl.zeros([row.shape[0], PIECE], tl.int32)
        for J in tl.static_range(16 // FIELD):
            if J * W < D:
                held = tl.load(x + row[:, None] + (J * W + word)[None, :], mask=alive[:, None], other=0.0).to(tl.float32)
                step, low = steps[(J * W + i * PIECE) // G], lows[(J * W + i * PIECE) // G]
                made |= codes_of(held, step[:, None], low[:, None], BITS, PLAIN) << (J * FIELD)
        tl.store(words + word[None, :] * G + inside[:, None], made.to(tl.int16), mask=alive[:, None])


@triton.jit(do_not_specialize=["n", "blocks", "window", "aged", "due"])
def fill(
    new_keys,  # [S, KV, n, D], channels next to each other
    new_values,  # likewise
    keys,  # int16 [S, KV, C / G, G, KW]
    key_ranges,  # int32 [S, KV, C / G, D]
    values,  # int16 [S, KV, C / G, VW, G]
    value_ranges,  # int32 [S, KV, C / G, D / G, G]
    window_keys,  # [S, KV, WINDOW, D]
    window_values,  # [S, KV, WINDOW, D]
    counts,  # int32 [S, 3]
    key_sequence,  # strides of new_keys
    key_head,
    key_token,
    value_sequence,
    value_head,
    value_token,
    n,
    blocks,  # C / G
    window,
    aged,  # keys that are to be codes, whole blocks
    due,  # values
    KV: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    KB: tl.constexpr,
    VB: tl.constexpr,
    KF: tl.constexpr,
    VF: tl.constexpr,
    KW: tl.constexpr,
    VW: tl.constexpr,
    PIECE: tl.constexpr,
    FEW: tl.constexpr,  # tokens at a time, which divide G
    PLAIN: tl.constexpr,
):
    """A prompt; a program has one block of it."""
    pair = tl.program_id(0)
    block = tl.program_id(1)
    sequence = pair // KV
    new_keys += sequence.to(tl.int64) * key_sequence + (pair % KV).to(tl.int64) * key_head
    new_values += sequence.to(tl.int64) * value_sequence + (pair % KV).to(tl.int64) * value_head
    place = pair.to(tl.int64) * blocks + block
    if block * G < aged:
        row = (block * G + tl.arange(0, G)).to(tl.int64) * key_token
        write_keys(new_keys, row, keys + place * (G * KW), key_ranges + place * D, G, D, KB, KF, KW, PIECE, PLAIN)
    line = tl.arange(0, D)
    for first in range(0, G, FEW):
        inside = first + tl.arange(0, FEW)
        at = block * G + inside
        row = at.to(tl.int64) * value_token
        if block * G + first < due:
            words, ranges = values + place * (G * VW), value_ranges + place * D
            write_values(new_values, row, words, ranges, inside, at < due, G, D, VB, VF, VW, PLAIN)
        to = (pair.to(tl.int64) * window + at % window) * D
        if block * G + first + FEW > due:
            waits = (at >= due) & (at < n)
            held = tl.load(new_values + row[:, None] + line[None, :], mask=waits[:, None], other=0.0)
            tl.store(window_values + to[:, None] + line[None, :], held, mask=waits[:, None])
        if block * G + first + FEW > aged:
            waits = (at >= aged) & (at < n)
            held = tl.load(new_keys + (at.to(tl.int64) * key_token)[:, None] + line[None, :], mask=waits[:, None], other=0.0)
            tl.store(window_keys + to[:, None] + line[None, :], held, mask=waits[:, None])
    if (block == 0) & (pair % KV == 0):
        tl.store(counts + 3 * sequence, aged)
        tl.store(counts + 3 * sequence + 1, due)
        tl.store(counts + 3 * sequence + 2, n)


@triton.jit(do_not_specialize=["blocks", "window", "residual"])
def append_token(
    new_keys,  # [S, KV, D]
    new_values,  # [S, KV, D]
    keys,  # as `fill` has them
    key_ranges,
    values,
    value_ranges,
    window_keys,
    window_values,
    counts,
    arrived,  # int32 [S], 0
    blocks,
    window,
    residual,
    KV: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    KB: tl.constexpr,
    VB: tl.constexpr,
    KF: tl.constexpr,
    VF: tl.constexpr,
    KW: tl.constexpr,
    VW: tl.constexpr,
    PIECE: tl.constexpr,
    PLAIN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What earlier tokens left to be quantized, then the next token's place in the window; `counts` say what and where."""
    started(EARLY)
    pair = tl.program_id(0)
    sequence = pair // KV
    counts += 3 * sequence
    coded_keys = tl.load(counts)
    coded_values = tl.load(counts + 1)
    n = tl.load(counts + 2)
    line = tl.arange(0, D)
    new_key = tl.load(new_keys + pair.to(tl.int64) * D + line)
    new_value = tl.load(new_values + pair.to(tl.int64) * D + line)
    window_keys += pair.to(tl.int64) * window * D
    window_values += pair.to(tl.int64) * window * D
    first = pair.to(tl.int64) * blocks
    aged = n - n % residual
    due = tl.maximum(n - residual, 0)
    for block in range(coded_keys // G, aged // G):
        row = (block * G + tl.arange(0, G)) % window * D
        write_keys(
            window_keys, row, keys + (first + block) * (G * KW), key_ranges + (first + block) * D, G, D, KB, KF, KW, PIECE, PLAIN
        )  # fmt: skip
    one = tl.arange(0, 1)
    for token in range(coded_values, due):
        place = first + token // G
        row, inside = token % window * D + one, token % G + one
        words, ranges = values + place * (G * VW), value_ranges + place * D
        write_values(window_values, row, words, ranges, inside, one == 0, G, D, VB, VF, VW, PLAIN)
    # The token may take the place of one that was just read.
    tl.debug_barrier()
    tl.store(window_keys + n % window * D + line, new_key)
    tl.store(window_values + n % window * D + line, new_value)
    # Whoever is last has seen all others read the counts.
    if tl.atomic_add(arrived + sequence, 1, sem="relaxed") == KV - 1:
        tl.store(arrived + sequence, 0)
        tl.store(counts, aged)
        tl.store(counts + 1, due)
        tl.store(counts + 2, n + 1)
