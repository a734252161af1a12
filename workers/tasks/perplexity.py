"""Perplexity over windows that are each scored alone.

PPL = exp(Σᵢ meanᵢ T / (n T)): windows of T tokens without overlap, no stride and no token put before a window; the T-1
shifted targets of a window are averaged and weighted by T. The text is tokenized once, so that a tokenizer that adds a
token for the beginning does so once (Frantar et al., GPTQ, and the tables that follow it).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels import kernel
from workers.datasets import batches
from workers.errors import NumericalError
from workers.tasks.base import Logits, Result, check_finite, chunks, item_ids, next_tokens

KIND = "perplexity"
VERSION = 1
PRIMARY = "ppl"
METRICS = {"ppl": False, "nll": False}
"""Metric ▸ whether higher is better."""
MOST_NATS = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Params:
    window: int = 512
    """Tokens per window; the literature takes 2048."""
    limit: int | None = None
    """Windows; None for all."""
    max_windows: int | None = None
    """The text is cut to max_windows x window tokens (256 for C4 in the literature)."""


def target_nll(logits: Tensor, batch: Tensor) -> Tensor:
    """logits `[B, T, V]`, tokens `[B, T]` ▸ -log p of each next token, nats, `[B, T-1]` float32."""
    targets = next_tokens(batch, logits)
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    log_probs = kernel("token_log_probs", device=logits.device).run.token_log_probs
    for part in chunks(logits):
        nll[part] = -log_probs(logits[part], targets[part])
    return nll


def run(logits: Logits, windows: Tensor, batch_tokens: int) -> Result:
    """windows `[n, T]` int64 ▸ scores ppl and nll (nats per token), one item per window."""
    count, length = windows.shape
    work = batches(windows, batch_tokens)
    means: list[float] = []
    for batch, out in zip(work, logits(work), strict=True):
        mean = target_nll(out, batch).double().mean(1)  # [B]
        check_finite(mean, len(means))
        means += mean.tolist()
    nll = math.fsum(means) / count
    if nll > MOST_NATS:
        raise NumericalError(
            f"the loss is {nll:.4g} nats a token, and no float holds its exponential: the model predicts nothing any more; more bits or "
            "smaller groups help"
        )
    return Result(
        columns={"id": item_ids(count), "n_tokens": [length - 1] * count, "weight": [float(length)] * count, "nll": means},
        scores={"ppl": math.exp(nll), "nll": nll},
        primary=PRIMARY,
    )
