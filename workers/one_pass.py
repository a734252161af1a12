"""Decoding of given tokens with one pass through the blocks, for a model that reads each of them from the disk to run it.

Every step has a forward of its own, a greenlet that waits behind each block until the steps after it have passed it, too. A block is
read once, and given up when the first step goes on to the next. One after another, n steps would read the checkpoint n times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import copy_context
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers.cache_utils import Cache

from workers import families
from workers.blocks import Taps, decoder_blocks
from workers.stream import streams


def serves(model: nn.Module) -> bool:
    """Whether the model is streamed, and its family keeps keys and values."""
    return streams(model) and bool(families.structure_of(model).cache_argument)


@torch.inference_mode()
def decode(model: nn.Module, steps: Iterable[Tensor], cache: Cache, take: Callable[[Any], None], **more: Any) -> None:
    """Forwards of steps with `cache`, an empty one; each block sees the inputs, and what the cache holds, that it sees in steps one after
    another. steps: the next tokens `[B, t]`, each asked for when the step before has passed the first block. take: called with the
    model's output of every step, in their order. more: arguments of the model."""
    blocks = decoder_blocks(model, families.structure_of(model))
    begun: list[greenlet] = []
    taps = Taps()
    try:
        for block in blocks:
            taps.add(block.register_forward_hook(_wait, prepend=True).remove)  # before a hook gives the block up
        for tokens in steps:
            begun.append(_step(model, tokens, take, {"use_cache": True, "past_key_values": cache, **more}))
            begun[-1].switch()
        for _ in blocks:
            for step in begun:
                step.switch()
    finally:
        taps.remove()
        for step in begun:
            if step:
                step.throw(GreenletExit)


def _step(model: nn.Module, tokens: Tensor, take: Callable[[Any], None], told: dict[str, Any]) -> greenlet:
    """A forward that stops behind every block."""
    step = greenlet(lambda: take(model(input_ids=tokens, **told)))
    # Or kernels would not be recorded there.
    step.gr_context = copy_context()
    return step


def _wait(module: nn.Module, args: Any, output: Any) -> None:
    parent = getcurrent().parent
    assert parent is not None
    parent.switch()
