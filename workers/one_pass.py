"""Decoding of given tokens with one pass through the blocks, for a model that reads each of them from the disk to run it.

Every step has a forward of its own, a greenlet that waits behind each block until the steps after it have passed it, too. A block is
read once, and given up when the first step goes on to the next. Step by step, T tokens would read the checkpoint T + 1 times.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from workers import families
from workers.blocks import Taps
from workers.generation import last_logits


@torch.inference_mode()
def decoded(model: nn.Module, prompt: Tensor, given: Tensor, cache: Cache | None = None) -> Tensor:
    """float32 `[B, steps + 1, V]`: logits after the prompt `[B, P]` and after each of the tokens `given` `[B, steps]`, those of
    `generation.generate`: every block sees the same inputs and the same cache. cache: an empty one; None: one in full precision.

    For families with keys and values (`Structure.cache_argument`)."""
    blocks: Any = model.get_submodule(families.structure_of(model).blocks)
    # Tokens of sliding windows are all held, and masked: how many there are is then known from the first block, which others have not.
    told = {"use_cache": True, "past_key_values": DynamicCache() if cache is None else cache, **last_logits(model)}
    steps = [_Step(model, tokens, told) for tokens in (prompt, *given.split(1, dim=1))]
    taps = Taps()
    try:
        for block in blocks:
            taps.add(block.register_forward_hook(_wait, prepend=True).remove)  # before a hook gives the block up
        for _ in range(len(blocks) + 1):
            for step in steps:
                step.resume()
        return torch.stack([step.logits for step in steps], dim=1)
    finally:
        taps.remove()
        for step in steps:
            step.give_up()


class _Step:
    """A forward that stops behind every block."""

    def __init__(self, model: nn.Module, tokens: Tensor, told: dict[str, Any]) -> None:
        self.logits: Tensor
        """float32 `[B, V]`."""

        def run() -> None:
            self.logits = model(input_ids=tokens, **told).logits[:, -1].to(torch.float32, copy=True)

        self._run = greenlet(run)
        # Or kernels would not be recorded there.
        self._run.gr_context = copy_context()

    def resume(self) -> None:
        self._run.switch()

    def give_up(self) -> None:
        if self._run:
            self._run.throw(GreenletExit)


def _wait(module: nn.Module, args: Any, output: Any) -> None:
    parent = getcurrent().parent
    assert parent is not None
    parent.switch()
