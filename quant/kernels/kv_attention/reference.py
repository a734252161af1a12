"""The cache is decoded and attended to, in float64 unless said otherwise; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.kv_attention import Cache, ages, append, append_one, checked, prepare

__all__ = ["ages", "append", "append_one", "kv_attention", "prepare"]


def kv_attention(
    q: Tensor, packed: Cache, scale: float | None = None, out: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """`[S, H, D]` in the type of q, rounded to it once from `dtype`, in which everything is computed."""
    made, factor = checked(q, packed, scale, out)
    keys, values = packed.decoded(dtype)
    rows = q.shape[1] // keys.shape[1]
    given = q.to(dtype).reshape(q.shape[0], keys.shape[1], rows, q.shape[2])
    scores = factor * torch.einsum("skrd,sktd->skrt", given, keys)
    length = packed.counts[:, 2]
    hidden = torch.arange(keys.shape[2], device=q.device) >= length[:, None]
    shares = torch.softmax(scores.masked_fill(hidden[:, None, None], -torch.inf), -1)
    return made.copy_(torch.einsum("skrt,sktd->skrd", shares, values).flatten(1, 2))
