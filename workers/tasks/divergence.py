"""How far a variant's predictions are from the unquantized model's, token by token.

kl: KL(reference || variant) of the next-token distributions, nats; top1_agreement: share of tokens where both predict the
same token; flips: share of tokens where the prediction turned from right to wrong or back ("Accuracy is Not All You
Need", Dutta et al. 2024); nll: the variant's. Windows are read alone; the T-1 positions with a known next token count.

The reference's log-probabilities come from its own evaluation, stored while they fit a budget, or from the reference
model walked beside the variant. Both give the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.artifact import CorruptArtifactError, payload_path
from workers.datasets import batches
from workers.tasks.base import Column, Logits, Result, check_finite, chunks, item_ids, log_probs, next_tokens, picked

KIND = "divergence"
VERSION = 1
PRIMARY = "kl"
METRICS = {"kl": False, "top1_agreement": True, "flips": False, "nll": False}
"""Metric ▸ whether higher is better."""
MARKER = "reference.json"
STORED = "reference.safetensors"
FAR = 80.0
"""Below e^FAR float32 does not overflow."""


@dataclass(frozen=True)
class Params:
    window: int = 512
    limit: int | None = None
    """Windows; None for all."""


@dataclass(frozen=True)
class TokenScores:
    """Per predicted token of a batch, `[B, T-1]` each."""

    kl: Tensor
    agree: Tensor
    flip: Tensor
    nll: Tensor


def compare(reference: Tensor, logits: Tensor, batch: Tensor) -> TokenScores:
    """reference: log-probabilities `[B, T-1, V]` float32; logits `[B, T, V]` of the variant; tokens `[B, T]`."""
    targets = next_tokens(batch, logits)
    scores = [torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(4)]
    for part in chunks(logits):
        p, q, target = reference[part].to(logits.device), log_probs(logits[part]), targets[part]
        top, other = p.argmax(-1), q.argmax(-1)
        scores[0][part] = _divergence(p, q)
        scores[1][part] = (top == other).float()
        scores[2][part] = ((top == target) != (other == target)).float()
        scores[3][part] = -picked(q, target)
    return TokenScores(*scores)


def compare_with_itself(reference: Tensor, batch: Tensor) -> TokenScores:
    """What `compare` gives for the logits that the log-probabilities `[B, T-1, V]` come from."""
    nll = -picked(reference, batch[:, 1:].to(reference.device))
    zero, one = torch.zeros_like(nll), torch.ones_like(nll)
    return TokenScores(kl=zero, agree=one, flip=zero, nll=nll)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Log-probabilities `[..., V]` of both ▸ KL(P || Q) `[...]`, nats.

    As Σ P (d + e^-d - 1) with d = log P - log Q, which is Σ P d because both sum to 1. No term of it is negative: the small
    divergences of 8-bit models would be lost in float32 rounding between the large terms of Σ P d."""
    d = p - q
    terms = torch.expm1(-d.clamp(min=-FAR)).add_(d).mul_(p.exp())
    if not d.amin() > -FAR:  # P e^-d is Q, and stays it where P is masked or below what float32 holds
        terms = torch.where(d > -FAR, terms, q.exp())
    return terms.sum(-1).clamp_min_(0.0)  # e^-d - 1 is rounded, too


def run(reference: Iterator[Tensor], logits: Logits, windows: Tensor, batch_tokens: int) -> Result:
    """reference: log-probabilities `[B, T-1, V]` per batch, in order; windows `[n, T]` ▸ one item per window."""
    work = batches(windows, batch_tokens)
    items = _Items()
    for batch, expected, out in zip(work, reference, logits(work), strict=True):
        items.add(compare(expected, out, batch))
    return items.result(windows)


def run_reference(logits: Logits, windows: Tensor, batch_tokens: int, payload: Path, budget_bytes: int) -> Result:
    """Evaluate the reference itself (kl 0, agreement 1, flips 0). Its log-probabilities are stored in `payload` when they
    fit `budget_bytes`; the marker says whether."""
    count, length = windows.shape
    work = batches(windows, batch_tokens)
    items = _Items()
    kept: Tensor | None = None
    needed = 0
    start = 0
    for batch, out in zip(work, logits(work), strict=True):
        found = _window_log_probs(out)
        items.add(compare_with_itself(found, batch))
        if start == 0:
            needed = 4 * count * (length - 1) * found.shape[-1]
            kept = torch.empty(count, *found.shape[1:]) if needed <= budget_bytes else None
        if kept is not None:
            kept[start : start + len(batch)] = found.cpu()
        start += len(batch)
    if kept is not None:
        save_file({"log_probs": kept}, payload / STORED)
    marker = {"stored": kept is not None, "bytes": needed, "windows": count, "window": length}
    (payload / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
    return items.result(windows)


def walk(logits: Logits, windows: Tensor, batch_tokens: int) -> Iterator[Tensor]:
    """Log-probabilities `[B, T-1, V]` float32 of the reference model, batch by batch."""
    work = batches(windows, batch_tokens)
    for out in logits(work):
        yield _window_log_probs(out)


def stored(folder: Path, windows: Tensor, batch_tokens: int) -> Iterator[Tensor] | None:
    """Log-probabilities as `walk` gives them, from the reference's artifact folder; None when it did not store them.

    Raises CorruptArtifactError.
    """
    marker = json.loads(payload_path(folder, MARKER).read_text())
    if not marker["stored"]:
        return None
    path = payload_path(folder, STORED)
    if (marker["windows"], marker["window"]) != tuple(windows.shape):
        raise CorruptArtifactError(folder.name, f"it holds windows {marker['windows']} x {marker['window']}, not {tuple(windows.shape)}")
    return _read(path, [len(b) for b in batches(windows, batch_tokens)])


def _read(path: Path, sizes: list[int]) -> Iterator[Tensor]:
    start = 0
    with safe_open(path, framework="pt") as f:
        rows = f.get_slice("log_probs")
        for size in sizes:
            yield rows[start : start + size]
            start += size


def _window_log_probs(logits: Tensor) -> Tensor:
    """`[B, T, V]` ▸ `[B, T-1, V]` float32, without the last position, whose next token is not known."""
    found = torch.empty(logits.shape[0], logits.shape[1] - 1, logits.shape[2], dtype=torch.float32, device=logits.device)
    for part in chunks(logits):
        found[part] = log_probs(logits[part])
    return found


class _Items:
    """Means per window, in order."""

    def __init__(self) -> None:
        self.means: dict[str, list[float]] = {name: [] for name in METRICS}

    def add(self, scores: TokenScores) -> None:
        for name, values in (("nll", scores.nll), ("kl", scores.kl), ("top1_agreement", scores.agree), ("flips", scores.flip)):
            mean = values.double().mean(1)  # [B]
            check_finite(mean, len(self.means[name]))
            self.means[name] += mean.tolist()

    def result(self, windows: Tensor) -> Result:
        count, length = windows.shape
        items: dict[str, Column] = {"id": item_ids(count), "n_tokens": [length - 1] * count, "weight": [float(length - 1)] * count}
        scores = {name: math.fsum(values) / count for name, values in self.means.items()}
        return Result(columns={**items, **self.means}, scores=scores, primary=PRIMARY)
