"""Fake quantization while the model runs: inputs of linears, and keys and values as they enter attention."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from quant.activation import fake_quantize_activation, fake_quantize_kv
from quant.hadamard import mix
from quant.scheme import ActivationScheme, KVScheme
from workers import families
from workers.blocks import Once, Taps, decoder_blocks, input_of, tap_inputs
from workers.errors import InputError
from workers.recipe import Recipe
from workers.steps import key_rotation
from workers.structure import Structure


class Runtime(Taps):
    """Handle of what was installed."""

    exact_inputs: tuple[Tensor, ...] = ()
    """int64, each once: inputs of some linears that stay in full precision."""


def attach(
    model: nn.Module,
    recipe: Recipe | None,
    activation: ActivationScheme | None,
    kv: KVScheme | None,
    only: Collection[str] | None = None,
) -> Runtime:
    """Install the hooks; those on inputs at the linears named in `only`, where it is given. Raises InputError, before any is
    installed, where static ranges are wanted and the recipe has none, and for keys and values of a model that keeps none."""
    structure = families.structure_of(model)
    if kv is not None and not structure.cache_argument:
        raise InputError(f"a {structure.model_type} model has no keys and values to quantize; use a scheme with kv: null")
    handle = Runtime()
    if activation is not None:
        _attach_activation(model, structure, recipe, activation, handle, only)
    if kv is not None:
        for block in decoder_blocks(model, structure):
            attention = block.get_submodule(structure.attention)
            hook = _quantize_cache(structure.cache_argument, kv)
            handle.add(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return handle


def _attach_activation(
    model: nn.Module,
    structure: Structure,
    recipe: Recipe | None,
    scheme: ActivationScheme,
    handle: Runtime,
    only: Collection[str] | None,
) -> None:
    ranges: dict[str, tuple[float, float] | None]
    exact: dict[str, Tensor] = {}
    if recipe is None:
        ranges = {structure.path(b, n): None for b in range(structure.count) for n in structure.linear_names()}
    else:
        ranges = {op["module"]: _static_range(op) for op in recipe.replaced() if only is None or op["module"] in only}
        outside = next(p.device for p in model.parameters() if not p.is_meta)
        exact = _exact_inputs(recipe, ranges, outside)
        handle.exact_inputs = tuple({id(t): t for t in exact.values()}.values())
    if not scheme.dynamic and any(r is None for r in ranges.values()):
        name = next(n for n, r in ranges.items() if r is None)
        raise InputError(
            f"static activation ranges are wanted, and {name} has none: quantize with activation.dynamic=false, or use dynamic=true"
        )

    shape = BatchShape()
    for block in decoder_blocks(model, structure):
        handle.add(block.register_forward_pre_hook(shape.record, with_kwargs=True).remove)
    once = Once()

    def tap(name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        kept = exact.get(name)
        return once.of(lambda: beside(kept, x, lambda rest: quantized_input(rest, tokens, scheme, ranges[name], shape)), x, kept)

    handle.add(tap_inputs(model, ranges, tap).remove)
    handle.add(once.forget)


class BatchShape:
    """Sequences and tokens a sequence of the batch that is running."""

    sequences: int
    length: int

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.sequences, self.length = input_of(args, kwargs).shape[:2]


def quantized_input(
    x: Tensor,
    tokens: Tensor | None,
    scheme: ActivationScheme,
    limits: tuple[float, float] | None,
    shape: BatchShape,
    dynamic: Callable[[Tensor, ActivationScheme], Tensor] = fake_quantize_activation,
) -> Tensor:
    """A dynamic range per tensor is one per sequence, and so are outliers that are kept, also where tokens come flat or, routed to an
    expert, picked."""
    if not scheme.dynamic:
        return fake_quantize_activation(x, scheme, limits)
    if not scheme.by_sequence or x.dim() > 2:
        return dynamic(x, scheme)
    if tokens is None:
        return dynamic(x.view(shape.sequences, shape.length, -1), scheme).view(x.shape)
    out = torch.empty_like(x)
    sequence = tokens // shape.length
    for s in torch.unique(sequence):
        out[sequence == s] = dynamic(x[sequence == s], scheme)
    return out


def beside(kept: Tensor | None, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """`quantize` on all channels but `kept` `[r]`, which neither change nor count for a range."""
    if kept is None:
        return quantize(x)
    rest = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device).index_fill(0, kept.to(x.device), False).nonzero()[:, 0]
    return x.index_copy(-1, rest, quantize(x.index_select(-1, rest)))


def _exact_inputs(recipe: Recipe, linears: Collection[str], device: torch.device) -> dict[str, Tensor]:
    """Of these linears ▸ inputs left in full precision; one tensor object for linears with the same."""
    found: dict[str, Tensor] = {}
    known: dict[tuple[int, ...], Tensor] = {}
    for op in recipe.replaced():
        kept = recipe.exact_inputs(op) if op["module"] in linears else None
        if kept is not None:
            found[op["module"]] = known.setdefault(tuple(kept.tolist()), kept.to(device))
    return found


def _static_range(op: dict[str, Any]) -> tuple[float, float] | None:
    return next(((s["low"], s["high"]) for s in op["input"] if s["op"] == "activation"), None)


class QuantizingCache:
    """Stands in for the cache that attention updates with rotated keys and values: quantizes them, then passes them on."""

    def __init__(self, inner: Any, scheme: KVScheme, mixed: int = 0) -> None:
        self._inner = inner
        self._scheme = scheme
        self._mixed = mixed
        """Channels of a head that a Hadamard matrix mixes while keys are quantized; 0: none."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """keys, values `[B, heads, T, D]`."""
        # (q M) · Q(k M) = q · (Q(k M) Mᵀ): turned back here, queries may stay as they are.
        keys = mix(self._round(mix(keys, self._mixed)), self._mixed, transpose=True)
        values = self._round(values)
        if self._inner is None:
            return keys, values
        out: tuple[Tensor, Tensor] = self._inner.update(keys, values, layer_idx, *args, **kwargs)
        return out

    def _round(self, x: Tensor) -> Tensor:
        return fake_quantize_kv(x, self._scheme)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _quantize_cache(argument: str, scheme: KVScheme) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, argument: QuantizingCache(kwargs.get(argument), scheme, key_rotation(module))}

    return hook
