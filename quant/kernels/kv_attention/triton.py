"""Attention in Triton: tokens are split among programs, so that few sequences fill a GPU, and a second launch merges what these made."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from quant.kernels.kv_attention import Cache, Plain, checked, field
from quant.kernels.kv_attention.on_device import ages, append, append_one, prepare
from quant.kernels.kv_attention.per_token import PerTokenPacked
from quant.kernels.on_triton import early, interpreted, multiprocessors, unavailable

__all__ = ["ages", "append", "append_one", "kv_attention", "prepare", "unavailable"]

SHARED, RESIDENT = 228 * 1024, 9
"""Bytes of shared memory of a multiprocessor, and programs of one warp that it has registers for."""
REGISTERS: int | None = None
"""The most of a thread where a program is one warp, for more programs at a time. 168 lets 11 of 4 bits in; Triton 3.6 then spills nothing,
3.9 some outside the loop over blocks."""
EARLY = True
"""Start both launches before what is in front of them is over, where the device can; they wait for that."""
START, MOST_SPLITS = 2, 128
"""Blocks that a program could read in the time that its start and end take."""
FEW, STAGES, WINDOW_STAGES, WARPS_PLAIN = 16, 3, 3, 4
"""Tokens of the window at a time; blocks in flight, with the one at work; the same of the window; warps where nothing is quantized."""
HEAVY = 4.0
"""Bytes of a channel of a token in the window: it takes as long as so many of codes."""


def kv_attention(q: Tensor, packed: Cache, scale: float | None = None, out: Tensor | None = None, splits: int | None = None) -> Tensor:
    """`[S, H, D]` in the type of q; sums and softmax in float32, p and q · steps rounded to float16 (the window: to its own type).

    splits: parts of the tokens of a sequence and KV head; chosen where None, from the room in the cache, not what lies on the device.
    """
    from quant.kernels.kv_attention.program import attend, attend_plain, merge
    from quant.kernels.kv_attention.program_per_token import attend_per_token

    made, factor = checked(q, packed, scale, out)
    s, h, d = q.shape
    kv = packed.heads
    rows = h // kv
    columns = max(8, 1 << (rows - 1).bit_length())
    parts = splits or _splits(s * kv, packed.capacity // packed.block, packed.block_bytes, multiprocessors(q.device))
    partial = torch.empty(s, h, parts, d, device=q.device)
    weights = torch.empty(s, h, parts, 2, device=q.device)
    grid, ends, plain = (s * kv, parts), factor * math.log2(math.e), interpreted()
    given, first = q.detach().contiguous(), early(q.device) if EARLY else {"EARLY": False}
    if isinstance(packed, Plain):
        attend_plain[grid](
            given, packed.keys, packed.values, packed.counts, partial, weights, ends, packed.capacity, parts,
            KV=kv, ROWS=rows, R=columns, D=d, T=packed.block, STAGES=STAGES, PLAIN=plain, num_warps=WARPS_PLAIN, **first,
        )  # fmt: skip
    elif isinstance(packed, PerTokenPacked):
        warps, most = shape(d, packed.block, rows, packed.ranges.shape[3])
        attend_per_token[grid](
            given, packed.keys, packed.values, packed.ranges, packed.counts, partial, weights, ends, packed.capacity // packed.block, parts,
            KV=kv, ROWS=rows, R=columns, D=d, T=packed.block, G=packed.group, BITS=field(packed.bits), W=packed.keys.shape[4],
            HALF=2 ** (packed.bits - 1) if packed.symmetric else 0, STAGES=STAGES, PLAIN=plain, num_warps=warps, maxnreg=most, **first,
        )  # fmt: skip
    else:
        ranges = [x.view(torch.int32) for x in (packed.key_ranges, packed.value_ranges)]
        heavy = max(1, round(HEAVY * d * packed.block / packed.block_bytes))
        warps, most = shape(d, packed.block, rows)
        attend[grid](
            given, packed.keys, ranges[0], packed.values, ranges[1], packed.window_keys, packed.window_values, packed.counts,
            partial, weights, ends, packed.capacity // packed.block, parts, packed.window, heavy,
            KV=kv, ROWS=rows, R=columns, D=d, T=packed.block, G=packed.block, KB=field(packed.key_bits), VB=field(packed.value_bits),
            KW=packed.keys.shape[4], VW=packed.values.shape[3], FEW=FEW, STAGES=STAGES,
            WINDOW_STAGES=WINDOW_STAGES, PLAIN=plain, num_warps=warps, maxnreg=most, **first,
        )  # fmt: skip
    merge[(s * h,)](
        partial, weights, made, parts, D=d, SPLITS=1 << (parts - 1).bit_length(), num_warps=min(4, max(1, d // 32)), **first
    )  # fmt: skip
    return made


def shape(width: int, block: int, rows: int, groups: int = 1) -> tuple[int, int | None]:
    """Warps, and the most registers of a thread, with which nothing is spilled. groups: of channels, where ranges are per token."""
    if groups > 4:
        return 8 if rows > 8 else 2, None
    if rows == 1 and width <= 128 and block <= 64:
        return 1, REGISTERS
    return (4 if width * block > 128 * 128 or rows > 8 else 2), None


@cache
def _splits(pairs: int, blocks: int, block_bytes: int, processors: int) -> int:
    """The fewest of the fastest, were all programs as fast as each other: pairs of sequence and KV head, blocks of one."""
    room = processors * max(1, min(RESIDENT, SHARED // ((STAGES - 1) * block_bytes + 1536)))
    most = max(1, min(blocks, MOST_SPLITS))
    return min(range(1, most + 1), key=lambda n: -(-pairs * n // room) * (-(-blocks // n) + START))
