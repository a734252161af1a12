"""A transformers cache whose layers are states of a KV quantizer, and the taps that give it keys before the rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from quant.kv import KVQuantizer, KVState
from workers import families
from workers.blocks import Taps, decoder_blocks


class QuantizedCache(Cache):
    """One quantizer per decoder block; a fresh cache per batch of sequences."""

    def __init__(self, quantizers: Sequence[KVQuantizer]) -> None:
        self._layers = [_Layer(q) for q in quantizers]
        super().__init__(layers=list(self._layers))

    def together(self) -> int | None:
        """Next tokens that may come in one forward pass and read the same as one by one; None for any number. The first block's layer
        says so for all, which have one rule, and may hold less yet (`workers.one_pass`)."""
        return self._layers[0].together()

    def attach(self, model: nn.Module) -> Taps:
        """Until `.remove()`, keys come from `k_proj` where the quantizer wants them before the rotary embedding."""
        structure = families.structure_of(model)
        taps = Taps()
        for block, layer in zip(decoder_blocks(model, structure), self._layers, strict=True):
            if layer.quantizer.pre_rope:
                attention = block.get_submodule(structure.attention)
                taps.add(attention.register_forward_pre_hook(layer.see_rotation, with_kwargs=True).remove)
                taps.add(attention.get_submodule("k_proj").register_forward_hook(layer.see_keys).remove)
        return taps


class _Layer(CacheLayerMixin):
    is_sliding = False
    """Windows of sliding attention are the mask's affair: all tokens are held."""

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.quantizer = quantizer
        self._state: KVState | None = None
        self._keys: Tensor | None = None
        self._rotation: tuple[Tensor, Tensor] | None = None
        """cos and sin `[1 or B, n, D]` of every token held."""

    def see_rotation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new = kwargs["position_embeddings"]
        old = self._rotation
        self._rotation = new if old is None else (torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1))

    def see_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._keys = output

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self._state = self.quantizer.new_state(b, h, d, key_states.dtype, key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`[B, H, T, D]` of the new tokens ▸ of all tokens, as the new ones see them."""
        if self._state is None:
            self.lazy_initialization(key_states, value_states)
        assert self._state is not None
        if not self.quantizer.pre_rope:
            self._state.append(key_states, value_states)
            return self._state.read()
        assert self._keys is not None, "attach the cache to the model first"
        assert self._rotation is not None
        b, h, t, d = key_states.shape
        self._state.append(self._keys.view(b, t, h, d).transpose(1, 2), value_states)
        self._keys = None
        keys, values = self._state.read()
        cos, sin = (x[:, None] for x in self._rotation)
        return keys * cos + rotate_half(keys) * sin, values

    def together(self) -> int | None:
        """As `KVState.together`."""
        state = self.quantizer.new_state(0, 0, 0) if self._state is None else self._state
        return state.together()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self._state is None else self._state.length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._state is not None:
            self._state.reorder(beam_idx)
        if self._rotation is not None and self._rotation[0].shape[0] > 1:
            self._rotation = (self._rotation[0].index_select(0, beam_idx), self._rotation[1].index_select(0, beam_idx))


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) ▸ (-b, a) of the halves of the last axis: the rotary embedding of `SEPARATE_ROTARY_KEYS` families."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


MakeCache = Callable[[], QuantizedCache]
