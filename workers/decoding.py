"""Logits by cached decoding: a window's own tokens go in step by step, and every step reads what the cache holds by then.

Many windows are decoded together, since a step reads all weights whatever the number of tokens it takes. A step takes several
tokens of a window where the method's rule makes that read the same (`KVState.together`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from workers import one_pass
from workers.kv_cache import MakeCache, QuantizedCache
from workers.stream import streams
from workers.tasks import base

LOGIT_BYTES = 2**19
"""Of logits kept, per token of a forward pass: 512 MiB on a CPU by default. All positions of a group of windows are decoded
before the first window can be scored."""


def decoded_logits(
    model: nn.Module,
    device: torch.device,
    runtime: Callable[[], AbstractContextManager[None]],
    make_cache: MakeCache,
    batch_tokens: int,
    prefill: int = 1,
    longest: int | None = None,
) -> base.Logits:
    """A model with a quantized cache, as tasks see it. The first `prefill` tokens of a window are one step; a step has at most
    `longest` tokens of a window (None: as many as `batch_tokens` allow)."""

    def logits(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for group in _groups(batches, model, batch_tokens, prefill):
            with runtime():
                found = _decode(model, torch.cat(list(group)).to(device), make_cache(), batch_tokens, prefill, longest)
            yield from torch.split(found, [len(b) for b in group])

    return logits


@torch.inference_mode()
def _decode(model: nn.Module, tokens: Tensor, cache: QuantizedCache, batch_tokens: int, prefill: int, longest: int | None) -> Tensor:
    """tokens `[B, T]` ▸ logits `[B, T, V]`."""
    found: Tensor | None = None
    done = 0

    def take(out: Any) -> None:
        nonlocal found, done
        if found is None:
            found = out.logits.new_empty(*tokens.shape, out.logits.shape[-1])
        end = done + out.logits.shape[1]
        found[:, done:end] = out.logits
        done = end

    steps = _steps(tokens, cache, batch_tokens, prefill, longest)
    with ExitStack() as stack:
        stack.callback(cache.attach(model).remove)
        if one_pass.serves(model):
            one_pass.decode(model, steps, cache, take)
        else:
            for step in steps:
                take(model(input_ids=step, past_key_values=cache, use_cache=True))
    assert found is not None
    return found


def _steps(tokens: Tensor, cache: QuantizedCache, batch_tokens: int, prefill: int, longest: int | None) -> Iterator[Tensor]:
    count, length = tokens.shape
    most = min(max(1, batch_tokens // count), longest or length)
    start = 0
    while start < length:
        step = min(prefill if start == 0 else min(most, cache.together() or most), length - start)
        yield tokens[:, start : start + step]
        start += step


def _groups(batches: Sequence[Tensor], model: nn.Module, batch_tokens: int, prefill: int) -> Iterator[list[Tensor]]:
    """Consecutive batches to decode together: at most one token of each window a step, and logits within their bytes. Whole windows that
    are one step gain nothing by company, unless blocks are read for it."""
    if not batches:
        return
    if prefill >= batches[0].shape[1] and not streams(model):
        yield from ([batch] for batch in batches)
        return
    config = getattr(model, "config", None)
    vocabulary = int(getattr(config, "vocab_size", 1))
    window = batches[0].shape[1] * vocabulary * next(model.parameters()).dtype.itemsize
    most = max(1, min(batch_tokens, LOGIT_BYTES * batch_tokens // window))
    group: list[Tensor] = []
    for batch in batches:
        if group and sum(map(len, group)) + len(batch) > most:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group
