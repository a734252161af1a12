"""Logits of whole windows, each batch in one forward, of a model that is resident or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from workers import families, one_pass
from workers.context import Context
from workers.memory import free_bytes
from workers.stream import streams
from workers.tasks import base

WAITING = 4
"""Hidden states of a batch that waits behind a block: the block's input and output, the first block's input, and as much for masks."""


def window_logits(model: nn.Module, context: Context, runtime: Callable[[], AbstractContextManager[None]]) -> base.Logits:
    """The model as tasks see it. Batches of a streamed one wait for each other behind every block, so that blocks are read once for as many
    as half of the free memory holds; that this is not for all is noted.

    Run-time parts are attached while the model runs only: a reference walked beside the variant may be the same module.
    """

    def logits(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for group in _groups(batches, model, context) if streams(model) else ([batch] for batch in batches):
            inputs = ({"input_ids": batch.to(context.device), "use_cache": False} for batch in group)
            outputs = one_pass.forwards(model, inputs) if len(group) > 1 else (model(**told) for told in inputs)
            for _ in group:
                with runtime(), torch.inference_mode():
                    out = next(outputs).logits
                yield out

    return logits


def _groups(batches: Sequence[Tensor], model: nn.Module, context: Context) -> list[list[Tensor]]:
    """Consecutive batches that share a pass through the blocks."""
    structure = families.structure_of(model)
    token = WAITING * structure.sites[0].cols * next(model.parameters()).dtype.itemsize
    needed = token * sum(batch.numel() for batch in batches)
    if context.kept is not None:
        context.kept.make_room(2 * needed)
    free = free_bytes(context.device)
    most = free // (2 * token)
    groups: list[list[Tensor]] = []
    left = 0
    for batch in batches:
        if not groups or left < batch.numel():
            groups.append([])
            left = most
        groups[-1].append(batch)
        left -= batch.numel()
    if len(groups) > 1:
        context.notes.append(
            f"the blocks were read {len(groups)} times: once for all windows needs {needed} bytes, half of the {free} free ones of "
            f"{context.device}"
        )
    return groups
