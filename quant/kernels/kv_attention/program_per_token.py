"""Decode attention for Triton on a cache whose keys, too, have their ranges per token. What `program` says holds; what differs is this.

Keys: score_t = Σ_g (step_tg Σ_d q_d code_td - zero_tg step_tg Σ_d q_d), g a group of channels and d one of its. q is multiplied with codes
as it is, so that its part of the products is the same for all tokens, and steps are applied to sums, in float32.

p · step is a float16 here too: below 2^-14 it has fewer bits, so that with 2 bits a value of the least step there is, 1e-5, is off by up to
0.1 %.

No token is in full precision: one loop over blocks, of which the last may end before its tokens do.
"""

# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from quant.kernels.kv_attention.program import UNIT, add_codes, codes_at, multiply, nothing_read, queries, scaled, softened, write
from quant.kernels.program_parts import started


@triton.jit
def token_scores(
    words, q, sums, steps, lows, factor,
    T: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """float32 [T, R]. words: W / PIECE parts int16 [T, PIECE]; q: D / PIECE parts float16 [PIECE, R]; of each group of channels, sums
    float32 [R], or [1] where columns are the same: of q; steps and lows float32 [T]."""
    UNITS: tl.constexpr = 8 // BITS
    coded = tl.zeros([T, R], tl.float32)
    rest = tl.zeros([T, R], tl.float32)
    for g in tl.static_range(D // G):
        total = tl.zeros([T, R], tl.float32)
        for u in tl.static_range(UNITS):
            # Codes of the highest place first: every sum is brought down to the next place.
            if u > 0:
                total *= 1.0 / (1 << BITS)
            for J in tl.static_range(UNITS - 1 - u, 16 // BITS, UNITS):
                for i in tl.static_range(W // PIECE):
                    if J * W + i * PIECE < D and (J * W + i * PIECE) // G == g:
                        total = multiply(codes_at(words[i], J, BITS, PLAIN), q[(J * W + i * PIECE) // PIECE], total, PLAIN)
        coded += total * steps[g][:, None]
        rest += lows[g][:, None] * sums[g][None, :]
    return (coded * UNIT + rest) * factor[None, :]


@triton.jit(do_not_specialize=["blocks", "splits"])
def attend_per_token(
    q,  # [S, H, D]
    keys,  # int16 [S, KV, C, W]
    values,  # int16 [S, KV, C / T, W, T]
    ranges,  # int32 [S, KV, C / T, D / G, 3, T], 2 for 3 where HALF is not 0: as `PerTokenPacked` has them
    counts,  # int32 [S, 3]
    partial,  # float32 [S, H, splits, D]
    weights,  # float32 [S, H, splits, 2]
    scale,  # of scores, times log2 e
    blocks,  # C / T
    splits,
    KV: tl.constexpr,
    ROWS: tl.constexpr,  # query heads of a KV head
    R: tl.constexpr,  # the same, as columns of a product
    D: tl.constexpr,
    T: tl.constexpr,  # tokens of a block
    G: tl.constexpr,  # channels that share a range
    BITS: tl.constexpr,
    W: tl.constexpr,
    HALF: tl.constexpr,  # the zero of symmetric ranges; 0: every range has its own
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
    EARLY: tl.constexpr,
):
    started(EARLY)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    length = tl.load(counts + 3 * (pair // KV) + 2)
    work = tl.cdiv(length, T)
    row = tl.arange(0, R)
    own = row < ROWS
    PLANES: tl.constexpr = 2 if HALF else 3
    PIECE: tl.constexpr = min(G, W)
    q += pair.to(tl.int64) * (ROWS * D)
    first = pair.to(tl.int64) * blocks
    keys += first * (T * W)
    values += first * (T * W)
    ranges += first * (T * PLANES * (D // G))
    # A lone query head is every column.
    head = tl.arange(0, 1 if ROWS == 1 else R)
    parts, above = queries(q, head, head < ROWS, PIECE, D // PIECE, D)
    factor = above * scale
    columns = ()
    for j in tl.static_range(D // PIECE):
        columns = columns + (tl.broadcast_to(parts[j], [PIECE, R]),)
    of_q = ()
    for g in tl.static_range(D // G):
        total = tl.sum(parts[g * (G // PIECE)].to(tl.float32), 0)
        for j in tl.static_range(1, G // PIECE):
            total += tl.sum(parts[g * (G // PIECE) + j].to(tl.float32), 0)
        of_q = of_q + (total,)
    token = tl.arange(0, T)
    every = token >= 0
    line = tl.arange(0, PIECE)
    most, weight, sums, lows = nothing_read(R, PIECE, D, G)

    for block in tl.range(work * split // splits, work * (split + 1) // splits, num_stages=STAGES):
        words = ()
        for i in tl.static_range(W // PIECE):
            words = words + (tl.load(keys + block * (T * W) + token[:, None] * W + (i * PIECE + line)[None, :]),)
        key_steps = ()
        key_lows = ()
        value_steps = ()
        value_lows = ()
        for g in tl.static_range(D // G):
            here = ranges + (block * (D // G) + g) * (PLANES * T) + token
            key_step = tl.load(here).to(tl.float32, bitcast=True)
            value_step = tl.load(here + T).to(tl.float32, bitcast=True)
            if HALF:
                key_low = -HALF * key_step
                value_low = -HALF * value_step
            else:
                zeros = tl.load(here + 2 * T)
                key_low = -zeros.to(tl.int16).to(tl.float32) * key_step
                value_low = -(zeros >> 16).to(tl.float32) * value_step
            key_steps = key_steps + (key_step,)
            key_lows = key_lows + (key_low,)
            value_steps = value_steps + (value_step,)
            value_lows = value_lows + (value_low,)
        s = token_scores(words, columns, of_q, key_steps, key_lows, factor, T, R, BITS, W, PIECE, D, G, PLAIN)
        s = tl.where((block * T + token < length)[:, None], s, -float("inf"))
        p, fade, most, weight = softened(s, most, weight, BITS)
        weighted = ()
        added = ()
        for g in tl.static_range(D // G):
            weighted = weighted + ((p * value_steps[g][:, None]).to(tl.float16),)
            added = added + (lows[g] * fade + tl.sum(p * value_lows[g][:, None], 0),)
        sums = add_codes(weighted, fade, sums, values + block * (T * W), token, every, T, BITS, W, PIECE, D, G, False, PLAIN)
        lows = added
    place = (pair.to(tl.int64) * ROWS + row) * splits + split
    write(partial, weights, place, own, scaled(sums, W, PIECE, D, BITS), lows, most, weight, W, PIECE, D, G)
