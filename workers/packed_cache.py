"""A transformers cache in KIVI's packed layout, and attention that reads it as it is stored, through the kernel `kv_attention`.

A prompt reads itself in full precision, by the model's usual attention; a step appends its token and asks the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from quant.kernels import TABLE, Kernel, kernel
from quant.kernels.kv_attention import Packed, ages, hold, told_one
from quant.kv import Kivi, make
from quant.scheme import KVScheme
from workers import families, kv_rules
from workers.errors import InputError
from workers.generation import FixedCache, room
from workers.specs import Workload

OPERATION = "kv_attention"
ATTENTION = "bitgrid_kv_attention"
"""Under which transformers knows the attention of this module."""
_layers: WeakKeyDictionary[nn.Module, _Layer] = WeakKeyDictionary()
"""Attention module ▸ its layer of the cache that was made last."""


class PackedCaches:
    """Makes empty caches for a model and a workload, whose backend is auto here where it is one of other kernels' alone.

    Raises InputError for a scheme, model or length that the kernel does not read."""

    def __init__(self, model: nn.Module, kv: KVScheme, workload: Workload, device: torch.device) -> None:
        config: Any = model.config
        reason = kv_rules.not_packed(kv, config.to_dict(), workload.prompt + workload.tokens)
        if reason is not None:
            raise InputError(reason)
        try:
            rule = make(kv)
            self.chosen: Kernel = kernel(OPERATION, workload.backend if workload.backend in TABLE[OPERATION] else "auto", device)
        except (ValueError, RuntimeError) as e:
            raise InputError(str(e)) from e
        assert isinstance(rule, Kivi)
        self._rule, self._length, self._model = rule, room(workload.prompt, workload.tokens), model
        structure = families.structure(config.to_dict())
        blocks: Any = model.get_submodule(structure.blocks)
        self._attention = [block.get_submodule(structure.attention) for block in blocks]
        self.last: list[_Layer] = []
        """Layers of the cache that was made last."""

    def __call__(self) -> PackedCache:
        self.last = [_Layer(self._rule, self.chosen.run, self._length) for _ in self._attention]
        _layers.update(zip(self._attention, self.last, strict=True))
        return PackedCache(self.last)

    @property
    def bytes(self) -> int:
        """What a step of the last cache reads of keys and values, all sequences and blocks together."""
        return sum(layer.packed.bytes for layer in self.last if layer.packed is not None)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it lasts the model's attention is this module's."""
        config: Any = self._model.config
        AttentionInterface.register(ATTENTION, _attention)
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before
            for module in self._attention:
                _layers.pop(module, None)


class PackedCache(FixedCache):
    """A step in which keys age is another than the others: they do so once in a window's length, all tokens of it together."""

    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__(layers=list(layers))
        self._layers = layers

    @contextmanager
    def on_device(self) -> Iterator[None]:
        for layer in self._layers:
            layer.on_device = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.on_device = False

    def by_host(self) -> bool:
        held = self._layers[0].packed
        return held is not None and ages(held)

    def replayed(self) -> None:
        for layer in self._layers:
            assert layer.packed is not None
            told_one(layer.packed)


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, rule: Kivi, run: Any, length: int) -> None:
        super().__init__()
        self._rule, self._run, self._length = rule, run, length
        self.packed: Packed | None = None
        self.on_device = False
        """Whether tokens are appended where the device, not the host, says."""
        self._reads_itself = self._empty = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rule = self._rule
        made = self._run.prepare(
            key_states, value_states, rule.key_bits, rule.value_bits, rule.group_size, rule.residual_length, self._length
        )
        if self.packed is None:
            self.packed = made
        else:
            hold(self.packed, made)
        self.is_initialized, self._empty = True, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`[B, H, T, D]` of the new tokens, returned as they are: attention finds the others here."""
        self._reads_itself = self._empty
        if self._empty:
            self.lazy_initialization(key_states, value_states)
        else:
            (self._run.append_one if self.on_device else self._run.append)(self.packed, key_states, value_states)
        return key_states, value_states

    def reset(self) -> None:
        self._empty = True

    def attend(self, query: Tensor, scale: float | None) -> Tensor | None:
        """query `[B, H, 1, D]` ▸ `[B, 1, H, D]`; None where the tokens read only each other."""
        if self._reads_itself:
            return None
        if query.shape[2] != 1:
            raise InputError(f"{query.shape[2]} tokens in one step; a packed cache is read by one at a time")
        out: Tensor = self._run.kv_attention(query[:, :, 0], self.packed, scale)
        return out[:, None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length, 0  # masks are not made for this attention

    def get_seq_length(self) -> int | Tensor:
        if self.packed is None or self._empty:
            return 0
        return self.packed.counts[0, 2].long() if self.on_device else self.packed.length

    def get_max_length(self) -> int:
        return self._length


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' interface has it: query `[B, H, T, D]` ▸ `[B, T, H, D]`. Nothing is padded here, so that a mask is not needed."""
    out = _layers[module].attend(query, scaling)
    if out is not None:
        return out, None
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return found
