"""Many forwards with one pass through the blocks, for a model that reads each of them from the disk to run it.

Every forward is a greenlet that waits behind each block until those after it have passed it, too. A block is read once, and given up when
the first forward goes on to the next. One after another, n forwards would read the checkpoint n times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    told = {"use_cache": True, "past_key_values": cache, **more}
    for out in forwards(model, ({"input_ids": tokens, **told} for tokens in steps)):
        take(out)


def forwards(model: nn.Module, inputs: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The model's output for each of `inputs`, its arguments, in their order. All pass the blocks before the first is given, and the hooks
    that make them wait are gone by then. Arguments are asked for when the forward before has passed the first block."""
    blocks = decoder_blocks(model, families.structure_of(model))
    begun: list[greenlet] = []
    taps = Taps()
    try:
        for block in blocks:
            taps.add(block.register_forward_hook(_wait, prepend=True).remove)  # before a hook gives the block up
        for told in inputs:
            begun.append(_forward(model, told))
            begun[-1].switch()
        for _ in blocks[1:]:
            for forward in begun:
                forward.switch()
        taps.remove()
        for forward in begun:
            yield forward.switch()
    finally:
        taps.remove()
        for forward in begun:
            if forward:
                forward.throw(GreenletExit)


def _forward(model: nn.Module, told: Mapping[str, Any]) -> greenlet:
    """Stops behind every block."""
    forward = greenlet(lambda: model(**told))
    # Or kernels would not be recorded there.
    forward.gr_context = copy_context()
    return forward


def _wait(module: nn.Module, args: Any, output: Any) -> None:
    parent = getcurrent().parent
    assert parent is not None
    parent.switch()
