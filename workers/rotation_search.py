"""The loss that learned rotations are searched with: the whole model in float32, rotated and fake-quantized, differentiable.

The model is opened a second time, with its norms fused and nothing rotated; every call makes the rotated weights anew from the two
kinds of matrices, so that gradients reach them. Rounding is passed straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from quant.activation import fake_quantize_activation, fake_quantize_kv
from quant.methods.base import Rotation, RotationLoss
from quant.methods.rtn import Rtn
from quant.scheme import ActivationScheme, KVScheme, WeightScheme
from quant.statistics import Statistics
from workers.blocks import Once, decoder_blocks, linear_view, tap_inputs
from workers.context import Context
from workers.rotate import Rotator, Weights, rotated, set_block_steps, sites_of
from workers.runtime import QuantizingCache
from workers.specs import QuantizeSpec
from workers.steps import key_rotation
from workers.stream import open_blocks
from workers.structure import Structure


@dataclass(frozen=True)
class Nearest:
    """How the search rounds a weight."""

    scheme: WeightScheme
    by: Rtn

    def __call__(self, weight: Tensor) -> Tensor:
        """`[N, K]`, with the gradient of the weight."""
        return _straight(weight, self.by.quantize(weight.detach(), Statistics(), self.scheme).tensor.dequantize().to(weight))


def search_loss(
    spec: QuantizeSpec,
    context: Context,
    tokens: Tensor,
    weight: Callable[[str], Nearest | None],
) -> RotationLoss:
    """(rotation, i) ▸ mean cross-entropy of sequence i (modulo their number) of tokens `[S, T]`.

    weight: linear's path ▸ how the search rounds it, if it does. Raises InputError where the model cannot be opened in float32."""
    model = open_blocks(context, replace(spec.model, dtype="float32"))
    sites, structure = sites_of(model), model.structure
    identity = Rotation(torch.eye(sites.hidden).double(), (torch.eye(sites.head_dim).double(),) * structure.count)
    Rotator(model, sites, identity).install()
    names = structure.linear_names()
    given: list[Weights] = []
    for i in range(structure.count):
        block = model.load(i)
        views = {n: linear_view(block, n) for n in names}
        given.append(
            Weights({n: v.weight() for n, v in views.items()}, {n: v.bias.detach() for n, v in views.items() if v.bias is not None})
        )
    model.on_load.clear()  # all are read; the rotator there holds the model, which would outlast its last use
    whole = model.model.requires_grad_(False)
    _attach(whole, structure, spec)

    def parameters(rotation: Rotation) -> dict[str, Tensor]:
        residual = rotation.residual.to(model.device, torch.float32)
        made = {f"{n}.weight": whole.get_submodule(n).weight @ residual for n in (*sites.embeddings, sites.head)}
        for i, value in enumerate(rotation.values):
            set_block_steps(model.blocks[i], structure, sites, rotation)
            new = rotated(given[i], sites, rotation, residual, value.to(residual))
            for n in names:
                path = structure.path(i, n)
                rounded = weight(path)
                made[f"{path}.weight"] = new.weight[n] if rounded is None else rounded(new.weight[n])
                if n in new.bias:
                    made[f"{path}.bias"] = new.bias[n]
        return made

    def loss(rotation: Rotation, i: int) -> Tensor:
        sequence = tokens[i % len(tokens)][None].to(model.device)
        logits = functional_call(whole, parameters(rotation), (sequence,), {"use_cache": False}).logits
        return F.cross_entropy(logits[0, :-1].float(), sequence[0, 1:])

    return loss


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x."""
    return x + (rounded - x).detach()


class _StraightCache(QuantizingCache):
    def _round(self, x: Tensor) -> Tensor:
        return _straight(x, fake_quantize_kv(x.detach(), self._scheme))


def searched(kv: KVScheme) -> bool:
    """Whether the search quantizes the cache: rules that are not one per token depend on more than the token at hand."""
    return kv.kind == "per_token"


def _attach(model: Any, structure: Structure, spec: QuantizeSpec) -> None:
    """Fake quantization of activations, keys and values, for as long as the model lives."""
    names = [structure.path(i, n) for i in range(structure.count) for n in structure.linear_names()]
    activation: ActivationScheme | None = spec.activation
    if activation is not None:
        # Static ranges are not known before the model is; the range of the sequence at hand is.
        scheme = activation if activation.dynamic else replace(activation, dynamic=True)
        once = Once()

        def tap(name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
            return once.of(lambda: _straight(x, fake_quantize_activation(x.detach(), scheme)), x)

        tap_inputs(model, names, tap)
    kv: KVScheme | None = spec.kv
    if kv is not None and searched(kv):

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            name = structure.cache_argument
            return args, {**kwargs, name: _StraightCache(kwargs.get(name), kv, key_rotation(module))}

        for block in decoder_blocks(model, structure):
            block.get_submodule(structure.attention).register_forward_pre_hook(hook, with_kwargs=True)
