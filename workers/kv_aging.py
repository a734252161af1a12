"""KIVI in a single forward pass: every query position reads the keys and values that decoding would show it.

Text is given, so all positions' hidden states can be computed together; only what a query reads differs. Query t reads position j in
one of three ways: key and value quantized (j < v), key alone (v <= j < k), neither (k <= j <= t), where k and v are the counts
quantized when t tokens are held. So attention gets three copies of all positions and a mask that lets each query see one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.kv import Kivi
from workers import families
from workers.blocks import Taps, decoder_blocks, input_of


@contextmanager
def aging(model: nn.Module, rule: Kivi, prefill: int) -> Iterator[None]:
    """Attention reads aged copies. For whole windows from their first token; the first `prefill` tokens read themselves in full precision.
    The model's family is one whose attention mask can be widened (`kv_rules.refuses`)."""
    structure = families.structure_of(model)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = input_of(args, kwargs)
        mask = widened(kwargs.get("attention_mask"), views(rule, hidden.shape[1], prefill).to(hidden.device))
        return args, {**kwargs, "attention_mask": mask, structure.cache_argument: _Copies(rule)}

    with Taps() as taps:
        for block in decoder_blocks(model, structure):
            taps.add(block.get_submodule(structure.attention).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def views(rule: Kivi, length: int, prefill: int) -> Tensor:
    """`[3, T, T]`: whether query t reads position j with key and value quantized, with the key quantized, or as it is."""
    counts = [(0, 0) if t < prefill else rule.quantized(t) for t in range(length)]
    keys, values = torch.tensor(counts).T[..., None]  # [T, 1] each
    at = torch.arange(length)
    return torch.stack([at < values, (at >= values) & (at < keys), at >= keys]) & (at <= at[:, None])


def widened(mask: Tensor | None, seen: Tensor) -> Tensor:
    """The model's own mask (None: causal; True or 0: seen) `[B, 1, T, T]` ▸ `[B, 1, T, 3 T]`."""
    wide = seen.transpose(0, 1).flatten(1)[None, None]
    if mask is None:
        return wide
    three = mask[..., : seen.shape[2]].repeat(1, 1, 1, 3)
    return three & wide if mask.dtype is torch.bool else three.masked_fill(~wide, torch.finfo(mask.dtype).min)


class _Copies:
    """Stands in for the cache: three copies of all positions."""

    def __init__(self, rule: Kivi) -> None:
        self._rule = rule

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """keys, values `[B, H, T, D]` ▸ `[B, H, 3 T, D]`."""
        whole, old = self._rule.quantized(keys.shape[2])
        aged = torch.cat([self._rule.keys_rounded(keys[:, :, :whole]), keys[:, :, whole:]], 2)
        rounded = torch.cat([self._rule.values_rounded(values[:, :, :old]), values[:, :, old:]], 2)
        return torch.cat([aged, aged, keys], 2), torch.cat([rounded, values, values], 2)
