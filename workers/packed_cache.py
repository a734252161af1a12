"""A transformers cache in a packed layout, and attention that reads it as it is stored, through the kernel `kv_attention`.

A prompt reads itself by the model's usual attention: with KIVI in full precision, with ranges per token as it is stored. A step appends its
token and asks the kernel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from quant.hadamard import mix
from quant.kernels import TABLE, Kernel, kernel
from quant.kernels.kv_attention import Packed, per_token, told_one
from quant.kernels.kv_attention.per_token import PerTokenPacked
from quant.kv import Kivi, KVState, PerToken, make
from quant.scheme import KVScheme
from workers import families, kv_rules
from workers.alike import TOLERANCE, relative
from workers.blocks import decoder_blocks
from workers.errors import InputError, NumericalError
from workers.generation import FixedCache, room
from workers.memory import free_bytes
from workers.specs import Workload
from workers.steps import key_rotation

OPERATION = "kv_attention"
ROUNDED = dict.fromkeys(TOLERANCE, 2.0**-6)
"""Relative error of attention where the query times a step, and shares times a step, are rounded to float16: 4 x 2^-11 of a head whose
channels are alike, more where one is larger."""
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
        assert isinstance(rule, Kivi | PerToken)
        self._rule, self._length, self._model, self._device = rule, room(workload.prompt, workload.tokens), model, device
        structure = families.structure_of(model)
        self._attention = [block.get_submodule(structure.attention) for block in decoder_blocks(model, structure)]
        self.last: list[_Layer] = []
        """Layers of the cache that was made last."""
        self.error = 0.0
        """The largest of a step's attention in a block, of those that were checked."""
        self.unchecked = 0
        """Blocks whose attention was not, for lack of memory."""
        self._share: int | None = None
        """Bytes of a simulated cache beside each that is made; None: none is."""

    def __call__(self) -> PackedCache:
        self.last = [self._layer(module) for module in self._attention]
        room = None if self._share is None else _Room(self._share)  # of its own: the one before is given up
        for layer in self.last:
            layer.room, layer.allowed = room, {} if self.chosen.backend == "reference" else ROUNDED
        _layers.update(zip(self._attention, self.last, strict=True))
        return PackedCache(self.last)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Caches made while it lasts keep a simulated one beside them (`quant.kv`, in float32, of the last sequence), with which every
        step's attention is compared: logits move by more than a wrong kernel's error where few bits are kept. Raises NumericalError."""
        self._share = free_bytes(self._device) // 4
        try:
            yield
        finally:
            self._share = None
            self.error = max((layer.error for layer in self.last), default=0.0)
            self.unchecked = sum(layer.beside is None for layer in self.last)
            for layer in self.last:
                layer.beside = None

    def _layer(self, attention: nn.Module) -> _Layer:
        if isinstance(self._rule, Kivi):
            return _KiviLayer(self._rule, self.chosen.run, self._length)
        return _PerTokenLayer(replace(self._rule, mixed=key_rotation(attention)), self.chosen.run, self._length)

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
    """KIVI's keys age once in a window's length, all of it together: a step in which they do may be another than was captured."""

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
        return self._layers[0].ages()

    def replayed(self) -> None:
        for layer in self._layers:
            layer.told_one()


class _Layer(CacheLayerMixin):
    is_sliding = False

    _rule: Kivi | PerToken

    def __init__(self, run: Any, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run, self._length = run, length
        self.packed: Packed | PerTokenPacked | None = None
        self.on_device = False
        """Whether tokens are appended where the device, not the host, says."""
        self.room: _Room | None = None
        """What the simulated cache may take; None: the layer is not checked."""
        self.allowed: Mapping[torch.dtype, float] = {}
        """Where that is more than of a product."""
        self.beside: KVState | None = None
        self.error = 0.0
        self._reads_itself = self._empty = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`[B, H, T, D]` of the new tokens: what a prompt reads of itself; in a step attention finds all tokens here."""
        self._reads_itself = self._empty
        if self._empty and self.room is not None:
            _, h, _, d = key_states.shape
            if self.room.take(2 * 2 * 4 * h * d * self._length):  # keys and values, in buffers of up to twice their length
                self.beside = self._unmixed().new_state(1, h, d, torch.float32, key_states.device)
        if self.beside is not None:
            self.beside.append(self._mixed(key_states[-1:]).float(), value_states[-1:].float())
        if not self._empty:
            self._append(key_states, value_states)
            return key_states, value_states
        self.lazy_initialization(key_states, value_states)
        self.is_initialized, self._empty = True, False
        return self._prompt_reads(key_states, value_states)

    @abstractmethod
    def _append(self, keys: Tensor, values: Tensor) -> None: ...

    @abstractmethod
    def _prompt_reads(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...

    def _mixed(self, x: Tensor) -> Tensor:
        """Keys as they are stored, or the query for them."""
        return x

    def _unmixed(self) -> Kivi | PerToken:
        """The rule for keys that were mixed before."""
        return self._rule

    def ages(self) -> bool:
        """Whether the next token changes more than its own place."""
        return False

    @abstractmethod
    def told_one(self) -> None:
        """The device appended a token in a replay."""

    def reset(self) -> None:
        self._empty = True

    def attend(self, query: Tensor, scale: float | None) -> Tensor | None:
        """query `[B, H, 1, D]` ▸ `[B, 1, H, D]`; None where the tokens read only each other."""
        if self._reads_itself:
            return None
        if query.shape[2] != 1:
            raise InputError(f"{query.shape[2]} tokens in one step; a packed cache is read by one at a time")
        out: Tensor = self._run.kv_attention(self._mixed(query[:, :, 0]), self.packed, scale)
        if self.beside is not None:
            self.error = max(self.error, self._compared(out[-1:], self._mixed(query[-1:]), *self.beside.read(), scale))
        return out[:, None]

    def _compared(self, out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> float:
        each = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(each, 1) for x in (keys, values))
        shares = torch.softmax(query.float() @ keys.mT * (query.shape[-1] ** -0.5 if scale is None else scale), -1)
        wanted = (shares @ values)[:, :, 0]
        error, allowed = relative(out.float() - wanted, wanted.norm()), self.allowed.get(out.dtype, TOLERANCE[out.dtype])
        if not error <= allowed:
            raise NumericalError(
                f"attention to the packed cache of {keys.shape[2]} tokens differs from that to the simulated one by {error:.2g} of its "
                f"norm, above {allowed:.2g}; use workload.backend=reference and report this"
            )
        return error

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length, 0  # masks are not made for this attention

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]  # as of transformers' StaticLayer, which says int
        if self.packed is None or self._empty:
            return 0
        return self.packed.counts[0, 2].long() if self.on_device else self.packed.length

    def get_max_length(self) -> int:
        return self._length


class _Room:
    """Bytes that are given away in parts."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, wanted: int) -> bool:
        """Whether there are as many."""
        if wanted > self._left:
            return False
        self._left -= wanted
        return True


class _KiviLayer(_Layer):
    packed: Packed | None
    _rule: Kivi

    def __init__(self, rule: Kivi, run: Any, length: int) -> None:
        super().__init__(run, length)
        self._rule = rule

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rule = self._rule
        self.packed = self._run.prepare(
            key_states, value_states, rule.key_bits, rule.value_bits, rule.group_size, rule.residual_length, self._length, self.packed
        )

    def _prompt_reads(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def _append(self, keys: Tensor, values: Tensor) -> None:
        (self._run.append_one if self.on_device else self._run.append)(self.packed, keys, values)

    def ages(self) -> bool:
        return self.packed is not None and self._run.ages(self.packed)

    def told_one(self) -> None:
        assert self.packed is not None
        told_one(self.packed)


class _PerTokenLayer(_Layer):
    packed: PerTokenPacked | None
    _rule: PerToken

    def __init__(self, rule: PerToken, run: Any, length: int) -> None:
        super().__init__(run, length)
        self._rule = rule

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.packed is None:
            rule, none = self._rule, slice(0, 0)
            self.packed = per_token.prepare(
                key_states[:, :, none],
                value_states[:, :, none],
                rule.bits_per_value,
                rule.symmetric,
                rule.group_size,
                rule.clip,
                self._length,
            )
        self.packed.length = 0
        per_token.append(self.packed, self._mixed(key_states), value_states)

    def _prompt_reads(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._rule.keys_rounded(keys), self._rule.values_rounded(values)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        assert self.packed is not None
        (per_token.append_one if self.on_device else per_token.append)(self.packed, self._mixed(keys), values)

    def _mixed(self, x: Tensor) -> Tensor:
        return mix(x, self._rule.mixed)

    def _unmixed(self) -> PerToken:
        return replace(self._rule, mixed=0)

    def told_one(self) -> None:
        assert self.packed is not None
        self.packed.length += 1


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' interface has it: query `[B, H, T, D]` ▸ `[B, T, H, D]`. Nothing is padded here, so that a mask is not needed."""
    out = _layers[module].attend(query, scaling)
    if out is not None:
        return out, None
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return found
