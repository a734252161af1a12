"""The log-probabilities in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.on_triton import unavailable

__all__ = ["token_log_probs", "unavailable"]

BLOCK = 4096


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    from quant.kernels.token_log_probs.program import pick

    given = logits.reshape(-1, logits.shape[-1])
    given = given if given.stride(1) == 1 else given.contiguous()
    rows, vocabulary = given.shape
    out = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, 1 << (vocabulary - 1).bit_length())
    if rows:
        pick[(rows,)](given, tokens.contiguous(), out, vocabulary, given.stride(0), BLOCK=block, num_warps=8)
    return out
