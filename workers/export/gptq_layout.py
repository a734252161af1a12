"""The tensor layout of AutoGPTQ checkpoints (version 1), as auto-gptq 0.7.1 reads it.

A linear y = W x + b with W `[N, K]`, W = scale[n, g(k)] * (code[n, k] - zero[n, g(k)]), is stored as

    qweight  int32 `[K * bits / 32, N]`   codes, packed along K
    qzeros   int32 `[G, N * bits / 32]`   zero - 1, packed along N
    scales   float16 `[G, N]`
    g_idx    int32 `[K]`                  group of each input
    bias     float16 `[N]`

Packing is one little-endian bit stream: 32 codes fill exactly `bits` words, the first code in the lowest bits; a 3-bit
code may cross from one word into the next.

A zero point of 0 is stored as 2^bits - 1. For 2, 4 and 8 bits and consecutive groups auto-gptq adds 1 modulo 2^bits and
reads 0 again; for 3 bits, and with act-order, it reads 2^bits, so there a 0 cannot be held. Other readers choose either.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
WORD = 32


def unholdable(bits: int, codes: Tensor, scale: Tensor, zero: Tensor, *, act_order: bool) -> str | None:
    """Why the layout cannot hold a weight of codes `[N, K]`, scale and zero `[N, G]`; None when it can.

    act_order: whether readers are told to use g_idx.
    """
    n, k = codes.shape
    if bits not in BITS:
        return f"{bits} bits; the format has 2, 3, 4 and 8"
    if k % WORD or n % WORD:
        return f"{k} inputs and {n} outputs; the format packs 32 at a time, so both must be multiples of 32"
    if zero.is_floating_point() and not torch.equal(zero, zero.round()):
        return "floating-point zero points; the format stores integers"
    lowest = 1 if bits == 3 or act_order else 0
    zero = zero.to(torch.int64)
    outside = int(((zero < lowest) | (zero >= 2**bits)).sum())
    if outside:
        return (
            f"{outside} of {zero.numel()} zero points outside {lowest} .. {2**bits - 1} (lowest {int(zero.min())}, highest "
            f"{int(zero.max())}), all that auto-gptq reads for {bits} bits {'with' if act_order else 'without'} act-order; "
            "with a symmetric scheme every zero point fits"
        )
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        return "scales that float16 cannot represent exactly"
    if not bool((half > 0).all() & torch.isfinite(half).all()):
        return "scales that are not positive finite float16 numbers"
    return None


def pack(bits: int, codes: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor) -> dict[str, Tensor]:
    """Tensors of one linear that `unholdable` has no objection to, without its bias.

    Args:
        codes: `[N, K]`, integers 0 .. 2^bits - 1.
        scale, zero: `[N, G]`.
        g_idx: `[K]`, the group of each input.
    """
    return {
        "qweight": pack_rows(codes.T, bits),
        "qzeros": pack_rows((zero.to(torch.int64) - 1) % 2**bits, bits).T.contiguous(),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Integers `[R, C]` in 0 .. 2^bits - 1, R a multiple of 32 ▸ int32 `[R * bits / 32, C]`, each column one bit stream."""
    rows, columns = values.shape
    blocks = values.to(torch.int64).reshape(rows // WORD, WORD, columns)
    words = torch.zeros(rows // WORD, bits, columns, dtype=torch.int64)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        words[:, word] |= blocks[:, i] << shift
        if shift + bits > WORD:
            words[:, word + 1] |= blocks[:, i] >> (WORD - shift)
    words &= 0xFFFFFFFF
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.reshape(-1, columns).to(torch.int32)
