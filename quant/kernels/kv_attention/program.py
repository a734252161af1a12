"""Decode attention for Triton: a program reads a part of the tokens of one sequence and KV head, for all query heads of that head.

Keys: score_t = Σ_d q_d (step_gd code_td + low_gd) = Σ_d (q_d step_gd) code_td + Σ_d q_d low_gd, g the tokens' group: what stands in
brackets and the last sum are made once for a group, so that codes are multiplied as they are. Values likewise: Σ_t (p_t step_tg) code_td +
Σ_t p_t low_tg. Both sums over codes are products on tensor cores, tokens or channels in rows, query heads in columns.

A code becomes a float16 by one mask of the word it lies in: float16 numbers below 2^-14 are whole multiples of 2^-24, and a code that
begins at bit u of 16, with no bit above the tenth, is code · 2^(u - 24). The factor is taken off the float32 sums. Bits 8 to 15 are shifted
down first, which two words of 16 bits in a register share.

q is divided by the power of two above its greatest, so that a product with a step, which is a float16, fits float16; p is 2^VB at most (VB:
bits of a value), so that small ones keep bits beside one token's that is nearly all. Softmax is to the base of 2, online, in float32.
"""

# A tuple grows under its name here, which types do not know and other ways of writing it the compiler.
# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005, SIM108

import triton
import triton.language as tl

from quant.kernels.program_parts import started

UNIT = tl.constexpr(2.0**24)


@triton.constexpr_function
def _masked(bits, at):
    """The codes that begin at bit `at` of both halves of a register."""
    mask = ((1 << bits) - 1) << at % 8
    both = f"0x{mask << 16 | mask:08x};"
    return f"and.b32 $0, $1, {both}" if at < 8 else "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, " + both + " }"


@triton.jit
def codes_at(words, J: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Codes number J of words int16, as float16 in units of 2^(J · BITS % 8 - 24)."""
    AT: tl.constexpr = J * BITS
    if PLAIN:
        mask: tl.constexpr = ((1 << BITS) - 1) << (AT % 8)
        return ((words >> (AT // 8 * 8)) & mask).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(_masked(BITS, AT), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def multiply(a, b, total, PLAIN: tl.constexpr):
    if PLAIN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def halves(both):
    """Step and low, float16, of the int32 that holds them."""
    return both.to(tl.int16).to(tl.float16, bitcast=True), (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def code_scores(
    words, ranges, q, factor, T: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, PLAIN: tl.constexpr
):
    """float32 [T, R]. words: int16 [T, W]; ranges: int32 [D]; q: planes float16 [W, R], [W, 1] where columns are the same."""
    UNITS: tl.constexpr = 8 // BITS
    line = tl.arange(0, W)
    total = tl.zeros([T, R], tl.float32)
    lows = tl.zeros([W, q[0].shape[1]], tl.float32)
    for u in tl.static_range(UNITS):
        # Codes of the highest place first: every sum is brought down to the next place.
        if u > 0:
            total *= 1.0 / (1 << BITS)
        for J in tl.static_range(UNITS - 1 - u, 16 // BITS, UNITS):
            if J * W < D:
                channel = J * W + line
                if W <= D:
                    both = tl.load(ranges + channel)
                else:
                    both = tl.load(ranges + channel, mask=channel < D, other=0)
                step, low = halves(both)
                weighted = tl.broadcast_to(q[J] * step[:, None], [W, R])
                total = multiply(codes_at(words, J, BITS, PLAIN), weighted, total, PLAIN)
                lows += q[J].to(tl.float32) * low[:, None].to(tl.float32)
    return total * (factor * UNIT)[None, :] + (tl.sum(lows, 0) * factor)[None, :]


@triton.jit
def softened(s, most, weight, LIFT: tl.constexpr):
    """p (2^LIFT at most), what earlier sums are multiplied with, the new greatest score less LIFT, and sum of p. A score is finite."""
    new = tl.maximum(most, tl.max(s, 0) - LIFT)
    p = tl.exp2(s - new[None, :])
    fade = tl.exp2(most - new)
    return p, fade, new, weight * fade + tl.sum(p, 0)


@triton.jit
def add_codes(
    weighted, fade, sums, words, token, alive,
    T: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, G: tl.constexpr, FINAL: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """`sums` with codes of a block added. weighted: D / G parts float16 [tokens, R], p times the steps of a token's groups."""
    line = tl.arange(0, PIECE)
    made = ()
    for i in tl.static_range(W // PIECE):
        here = tl.load(words + (i * PIECE + line)[:, None] * T + token[None, :], mask=alive[None, :], other=0)
        for J in tl.static_range(16 // BITS):
            if J * W + i * PIECE < D:
                codes = codes_at(here, J, BITS, PLAIN)
                own = weighted[(J * W + i * PIECE) // G]
                old = sums[len(made)] * fade[None, :]
                if FINAL:
                    one = multiply(codes, own, tl.zeros([PIECE, fade.shape[0]], tl.float32), PLAIN)
                    made = made + (old + one * (UNIT / (1 << (J * BITS % 8))),)
                else:
                    made = made + (multiply(codes, own, old, PLAIN),)
    return made


@triton.jit
def add_values(
    p, fade, sums, lows, words, ranges, token, alive, read,
    T: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, G: tl.constexpr, FINAL: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """`sums` and `lows` with tokens of a block added: p float32 [tokens, R]; words int16 [W, T]; ranges int32 [D / G, T].

    alive: tokens that count; read: those whose codes are read, these at least. FINAL: sums are values already; otherwise in the codes'
    units."""
    weighted = ()
    added = ()
    for g in tl.static_range(D // G):
        step, low = halves(tl.load(ranges + T * g + token, mask=alive, other=0))
        weighted = weighted + ((p * step[:, None].to(tl.float32)).to(tl.float16),)
        added = added + (lows[g] * fade + tl.sum(p * low[:, None].to(tl.float32), 0),)
    made = add_codes(weighted, fade, sums, words, token, read, T, BITS, W, PIECE, D, G, FINAL, PLAIN)
    return made, added


@triton.jit
def scaled(sums, W: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Sums in the codes' units ▸ values."""
    made = ()
    for i in tl.static_range(W // PIECE):
        for J in tl.static_range(16 // BITS):
            if J * W + i * PIECE < D:
                made = made + (sums[len(made)] * (UNIT / (1 << (J * BITS % 8))),)
    return made


@triton.jit
def window_scores(given, held, slot, alive, W: tl.constexpr, D: tl.constexpr, PLAIN: tl.constexpr):
    """float32 [T, R] of tokens `slot` of a window [WINDOW, D], W channels at a time; given: those of q, [W, R]."""
    line = tl.arange(0, W)
    total = tl.zeros([slot.shape[0], given[0].shape[1]], tl.float32)
    for j in tl.static_range((D + W - 1) // W):
        inside = j * W + line < D
        keys = tl.load(held + slot[:, None] * D + (j * W + line)[None, :], mask=alive[:, None] & inside[None, :], other=0.0)
        total = multiply(keys, given[j], total, PLAIN)
    return total


@triton.jit
def add_window(p, sums, held, slot, alive, W: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, PLAIN: tl.constexpr):
    """`sums` with p times the values of tokens `slot` of a window [WINDOW, D] added."""
    line = tl.arange(0, PIECE)
    made = ()
    for i in tl.static_range(W // PIECE):
        for first in tl.static_range(i * PIECE, D, W):
            there = tl.load(held + slot[None, :] * D + (first + line)[:, None], mask=alive[None, :], other=0.0)
            made = made + (multiply(there, p.to(there.dtype), sums[len(made)], PLAIN),)
    return made


@triton.jit
def queries(q, row, alive, W: tl.constexpr, PLANES: tl.constexpr, D: tl.constexpr):
    """Planes of q float16 [W, rows], divided by a power of two, and that [rows]."""
    line = tl.arange(0, W)
    great = tl.zeros([row.shape[0]], tl.float32)
    for j in tl.static_range(PLANES):
        if j * W < D:
            part = tl.load(q + row[None, :] * D + (j * W + line)[:, None], mask=alive[None, :] & (j * W + line < D)[:, None], other=0.0)
            great = tl.maximum(great, tl.max(tl.abs(part.to(tl.float32)), 0))
    # Of the exponent's bits alone; of 1e-30 where all are zero.
    bits = tl.maximum(great, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    above = 2 * bits.to(tl.float32, bitcast=True)
    inverse = (0x7E800000 - bits).to(tl.float32, bitcast=True)
    planes = ()
    for j in tl.static_range(PLANES):
        if j * W < D:
            part = tl.load(q + row[None, :] * D + (j * W + line)[:, None], mask=alive[None, :] & (j * W + line < D)[:, None], other=0.0)
            planes = planes + ((part.to(tl.float32) * inverse[None, :]).to(tl.float16),)
    return planes, above


@triton.jit
def nothing_read(R: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Where a split begins: the greatest score and the sum of weights [R], sums of values [PIECE, R], and of what groups add [R]."""
    sums = ()
    for _ in tl.static_range(D // PIECE):
        sums = sums + (tl.zeros([PIECE, R], tl.float32),)
    lows = ()
    for _ in tl.static_range(D // G):
        lows = lows + (tl.zeros([R], tl.float32),)
    return tl.full([R], -float("inf"), tl.float32), tl.zeros([R], tl.float32), sums, lows


@triton.jit
def write(partial, weights, place, own, sums, lows, most, weight, W: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """What `merge` reads of a split, in its place [R]; W: words of a token's values."""
    line = tl.arange(0, PIECE)
    PLANES: tl.constexpr = max(1, D // W)
    for i in tl.static_range(W // PIECE):
        for channel in tl.static_range(i * PIECE, D, W):
            made = sums[i * PLANES + channel // W] + lows[channel // G][None, :]
            tl.store(partial + place[None, :] * D + (channel + line)[:, None], made, mask=own[None, :])
    tl.store(weights + 2 * place, most, mask=own)
    tl.store(weights + 2 * place + 1, weight, mask=own)


@triton.jit(do_not_specialize=["blocks", "splits", "window", "heavy"])
def attend(
    q,  # [S, H, D]
    keys,  # int16 [S, KV, C, KW]
    key_ranges,  # int32 [S, KV, C / T, D]: two float16, the step lower
    values,  # int16 [S, KV, C / T, VW, T]
    value_ranges,  # int32 [S, KV, C / T, D / G, T]: likewise
    window_keys,  # [S, KV, WINDOW, D]
    window_values,  # [S, KV, WINDOW, D]
    counts,  # int32 [S, 3]
    partial,  # float32 [S, H, splits, D]
    weights,  # float32 [S, H, splits, 2]
    scale,  # of scores, times log2 e
    blocks,  # C / T
    splits,
    window,
    heavy,  # blocks whose codes take as long as a block of the window
    KV: tl.constexpr,
    ROWS: tl.constexpr,  # query heads of a KV head
    R: tl.constexpr,  # the same, as columns of a product
    D: tl.constexpr,
    T: tl.constexpr,  # tokens of a block, which share the steps of keys
    G: tl.constexpr,  # channels that share those of values
    KB: tl.constexpr,
    VB: tl.constexpr,
    KW: tl.constexpr,
    VW: tl.constexpr,
    FEW: tl.constexpr,  # tokens of the window at a time, of one block
    STAGES: tl.constexpr,
    WINDOW_STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
    EARLY: tl.constexpr,
):
    started(EARLY)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    sequence = pair // KV
    coded_keys = tl.load(counts + 3 * sequence)
    coded_values = tl.load(counts + 3 * sequence + 1)
    length = tl.load(counts + 3 * sequence + 2)
    whole = tl.minimum(coded_keys, coded_values) // T
    work = whole + heavy * tl.cdiv(length - whole * T, T)
    last = split == splits - 1
    begin = tl.minimum(whole, work * split // splits)
    end = tl.where(last, whole, tl.minimum(whole, work * (split + 1) // splits))

    row = tl.arange(0, R)
    own = row < ROWS
    q += pair.to(tl.int64) * (ROWS * D)
    first = pair.to(tl.int64) * blocks
    keys += first * (T * KW)
    key_ranges += first * D
    values += first * (T * VW)
    value_ranges += first * (T * (D // G))
    window_keys += pair.to(tl.int64) * window * D
    window_values += pair.to(tl.int64) * window * D
    PIECE: tl.constexpr = min(G, VW)
    # A lone query head is every column: its products with steps are made once.
    head = tl.arange(0, 1 if ROWS == 1 else R)
    planes, above = queries(q, head, head < ROWS, KW, 16 // KB, D)
    factor = above * scale
    token = tl.arange(0, T)
    every = token >= 0
    key_line = tl.arange(0, KW)
    most, weight, sums, lows = nothing_read(R, PIECE, D, G)

    for block in tl.range(begin, end, num_stages=STAGES):
        words = tl.load(keys + block * (T * KW) + token[:, None] * KW + key_line[None, :])
        s = code_scores(words, key_ranges + block * D, planes, factor, T, R, KB, KW, D, PLAIN)
        p, fade, most, weight = softened(s, most, weight, VB)
        here = value_ranges + block * (T * (D // G))
        codes = values + block * (T * VW)
        sums, lows = add_values(p, fade, sums, lows, codes, here, token, every, every, T, VB, VW, PIECE, D, G, False, PLAIN)
    sums = scaled(sums, VW, PIECE, D, VB)

    # The window, and codes of tokens of which the other one is in the window; fewer at a time, for the sake of registers. Keys are one
    # or the other for all of them. So are values, but where one block ends: there codes that count for nothing are read.
    few = tl.arange(0, FEW)
    given = ()
    # Only where there is a window is q waited for.
    asked = row < tl.where(last, ROWS, 0)
    for j in tl.static_range((D + KW - 1) // KW):
        channel = j * KW + key_line
        whole_q = tl.load(q + row[None, :] * D + channel[:, None], mask=asked[None, :] & (channel < D)[:, None], other=0.0)
        given = given + (whole_q.to(window_keys.dtype.element_ty),)
    for start in tl.range(tl.where(last, whole * T, length), length, FEW, num_stages=WINDOW_STAGES):
        at = start + few
        block = start // T
        same = start + 0 * few
        coded = same < coded_keys
        words = tl.load(keys + start * KW + few[:, None] * KW + key_line[None, :], mask=coded[:, None], other=0)
        s = code_scores(words, key_ranges + block * D, planes, factor, FEW, R, KB, KW, D, PLAIN)
        slot = at % window
        alive = at < length
        held = window_scores(given, window_keys, slot, alive & (same >= coded_keys), KW, D, PLAIN)
        s = tl.where(coded[:, None], s, tl.where(alive[:, None], held * scale, -float("inf")))
        p, fade, most, weight = softened(s, most, weight, VB)
        coded = at < coded_values
        here = value_ranges + block * (T * (D // G))
        # As it is, but known to be a multiple: tokens are read together.
        inside = start % T // FEW * FEW + few
        codes, read = values + block * (T * VW), same < coded_values
        sums, lows = add_values(p, fade, sums, lows, codes, here, inside, coded, read, T, VB, VW, PIECE, D, G, True, PLAIN)
        sums = add_window(p, sums, window_values, slot, alive & (at >= coded_values), VW, PIECE, D, PLAIN)

    place = (pair.to(tl.int64) * ROWS + row) * splits + split
    write(partial, weights, place, own, sums, lows, most, weight, VW, PIECE, D, G)


@triton.jit(do_not_specialize=["splits"])
def attend_plain(
    q,  # [S, H, D]
    keys,  # [S, KV, C, D]
    values,  # [S, KV, C, D]
    counts,  # int32 [S, 3]
    partial,  # float32 [S, H, splits, D]
    weights,  # float32 [S, H, splits, 2]
    scale,  # of scores, times log2 e
    capacity,
    splits,
    KV: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The same with keys and values as they are."""
    started(EARLY)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    length = tl.load(counts + 3 * (pair // KV) + 2)
    work = tl.cdiv(length, T)
    row = tl.arange(0, R)
    own = row < ROWS
    q += pair.to(tl.int64) * (ROWS * D)
    keys += pair.to(tl.int64) * capacity * D
    values += pair.to(tl.int64) * capacity * D
    token = tl.arange(0, T)
    line = tl.arange(0, D)
    given = tl.load(q + row[None, :] * D + line[:, None], mask=own[None, :], other=0.0).to(keys.dtype.element_ty)
    most = tl.full([R], -float("inf"), tl.float32)
    weight = tl.zeros([R], tl.float32)
    sums = tl.zeros([D, R], tl.float32)
    for block in tl.range(work * split // splits, work * (split + 1) // splits, num_stages=STAGES):
        at = block * T + token
        held = tl.load(keys + at[:, None] * D + line[None, :], mask=(at < length)[:, None], other=0.0)
        s = multiply(held, given, tl.zeros([T, R], tl.float32), PLAIN) * scale
        p, fade, most, weight = softened(tl.where((at < length)[:, None], s, -float("inf")), most, weight, 0)
        there = tl.load(values + at[None, :] * D + line[:, None], mask=(at < length)[None, :], other=0.0)
        sums = multiply(there, p.to(there.dtype), sums * fade[None, :], PLAIN)
    place = (pair.to(tl.int64) * ROWS + row) * splits + split
    tl.store(partial + place[None, :] * D + line[:, None], sums, mask=own[None, :])
    tl.store(weights + 2 * place, most, mask=own)
    tl.store(weights + 2 * place + 1, weight, mask=own)


@triton.jit(do_not_specialize=["splits"])
def merge(
    partial,  # float32 [S H, splits, D]
    weights,  # float32 [S H, splits, 2]
    out,  # [S H, D]
    splits,
    D: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of 2, at least `splits`
    EARLY: tl.constexpr,
):
    started(EARLY)
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    alive = split < splits
    here = weights + 2 * (head * splits + split)
    most = tl.load(here, mask=alive, other=-float("inf"))
    share = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(share * tl.load(here + 1, mask=alive, other=0.0), 0)
    line = tl.arange(0, D)
    parts = tl.load(partial + (head * splits + split)[:, None] * D + line[None, :], mask=alive[:, None], other=0.0)
    tl.store(out + head * D + line, tl.sum(parts * share[:, None], 0) / total)
