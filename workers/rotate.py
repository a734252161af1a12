"""Rotations folded into a model: norms fused, embeddings, blocks and head rotated, steps for the run time installed.

Row vectors: the stream h becomes h R. With x the norm's output, x = h / rms(h) · g + b:
  readers   y = x Wᵀ + c              ▸ W diag(g) R, bias c + W b
  writers   h += x Wᵀ + c             ▸ Rᵀ W, bias c R (LayerNorm models: the mean over outputs is taken off before)
  values    v ▸ v V for every head    ▸ rows of W; the output projection's columns get V
  run time  x ▸ x M before a linear   ▸ W M, M orthonormal
Everything is computed in float64 from the checkpoint's weights and stored once in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant.hadamard import mix
from quant.methods.base import ModelShape, Rotation
from workers import steps
from workers.blocks import check_held, linear_view
from workers.capture import BlockStatistics
from workers.errors import InputError
from workers.rotatable import Rotatable, recollects, rotatable
from workers.stream import BlockModel
from workers.structure import Structure

ROWS = 4096
"""Rows of an embedding that are in float64 at a time."""
ROTATED = "rotated"
ONLINE = "a rotation mixes its channels at run time"


@dataclass
class Weights:
    """Weights `[N, K]` and biases `[N]` of a block's linears by relative name, of one float type."""

    weight: dict[str, Tensor]
    bias: dict[str, Tensor]


def rotated(given: Weights, sites: Rotatable, rotation: Rotation, residual: Tensor, value: Tensor) -> Weights:
    """A block with fused norms in another basis. Differentiable in residual `[hidden, hidden]` and value `[D, D]`."""
    w, b = dict(given.weight), dict(given.bias)
    for _, readers in sites.readers:
        for name in readers:
            w[name] = w[name] @ residual
    for name in sites.writers:
        w[name] = residual.T @ w[name]
        if name in b:
            b[name] = b[name] @ residual
    rows = torch.unflatten(w[sites.value], 0, (-1, sites.head_dim))
    w[sites.value] = torch.einsum("hdk,de->hek", rows, value).flatten(0, 1)
    if sites.value in b:
        b[sites.value] = (torch.unflatten(b[sites.value], 0, (-1, sites.head_dim)) @ value).flatten()
    w[sites.output] = (torch.unflatten(w[sites.output], 1, (-1, sites.head_dim)) @ value).flatten(1)
    w[sites.output] = steps.mix_heads(w[sites.output], sites.heads, rotation.heads)
    w[sites.down] = mix(w[sites.down], rotation.down)
    return Weights(w, b)


@dataclass
class Rotator:
    """Rotates an opened model: what is outside its blocks at once, every block as it is read."""

    model: BlockModel
    sites: Rotatable
    rotation: Rotation
    maps: frozenset[str] = frozenset()
    """Statistics that carry over exactly."""
    gains: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """(block, norm) ▸ the scale that was fused, float64."""
    eps: dict[str, float] = field(default_factory=dict)
    """Norm (relative, or the final norm's path) ▸ the model's own eps."""

    @property
    def structure(self) -> Structure:
        """Of the rotated model: scales no longer pass through what is mixed at run time."""
        mixed = {n for n, block in ((self.sites.output, self.rotation.heads), (self.sites.down, self.rotation.down)) if block}
        groups = tuple(replace(g, reason=ONLINE) if mixed & {*g.consumers} else g for g in self.model.structure.groups)
        return replace(self.model.structure, groups=groups)

    def install(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Rotate what is outside the blocks now and every block when it is read; the operations and tensors that say so."""
        made = self._outer()
        self.model.on_load.append(self.fold)
        return made

    def _outer(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        whole, sites = self.model.model, self.sites
        operations: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        if any(whole.get_submodule(sites.head).weight is whole.get_submodule(n).weight for n in sites.embeddings):
            steps.untie_head(whole, sites.head)
            operations.append({"op": "untie_head", "module": sites.head})
        gain, shift = self._norm(whole.get_submodule(sites.final_norm), sites.final_norm)
        operations.append({"op": "set_norm", "module": sites.final_norm, "kind": "rms", "eps": self.eps[sites.final_norm], "tensors": {}})
        head = whole.get_submodule(sites.head)
        bias = None
        if shift is not None:
            new = head.weight.detach().double() @ shift
            steps.write_bias(head, new if head.bias is None else head.bias.detach().double() + new)
            bias = f"{sites.head}.bias"
            tensors[bias] = head.bias
        residual = self._residual()
        for name in (*sites.embeddings, sites.head):
            embedding = name != sites.head
            weight = whole.get_submodule(name).weight
            for part in weight.detach().split(ROWS):
                rows = part.double()
                if embedding and sites.centred:
                    rows = rows - rows.mean(-1, keepdim=True)
                part.copy_((rows if embedding else rows * gain) @ residual)
            check_held(weight, name, ROTATED)
            tensors[f"{name}.weight"] = weight
            operations.append({"op": "dense", "module": name, "tensor": f"{name}.weight", "bias": None if embedding else bias})
        return operations, tensors

    def fold(self, i: int) -> None:
        """Fuse the norms of block `i`, rotate its linears, install its steps."""
        block = self.model.blocks[i]
        fused = self.fuse(i)
        value = self.rotation.values[i].to(self.model.device)
        made = rotated(fused, self.sites, self.rotation, self._residual(), value)
        write(block, made, self.model.structure.path(i, ""))
        set_block_steps(block, self.model.structure, self.sites, self.rotation)

    def fuse(self, i: int) -> Weights:
        """Weights and biases of block `i` in float64 with its norms fused, which have no scale after this."""
        block, sites = self.model.blocks[i], self.sites
        views = {n: linear_view(block, n) for n in self.model.structure.linear_names()}
        w = {n: v.weight().double() for n, v in views.items()}
        b = {n: v.bias.detach().double() for n, v in views.items() if v.bias is not None and not v.bias.is_meta}
        for norm, readers in sites.readers:
            gain, shift = self._norm(block.get_submodule(norm), norm)
            self.gains[i, norm] = gain
            for name in readers:
                if shift is not None:
                    b[name] = b.get(name, 0) + w[name] @ shift
                w[name] = w[name] * gain
        if sites.centred:
            for name in sites.writers:
                w[name] = w[name] - w[name].mean(0)
                if name in b:
                    b[name] = b[name] - b[name].mean()
        return Weights(w, b)

    def _norm(self, module: Any, name: str) -> tuple[Tensor, Tensor | None]:
        """(scale, bias) `[hidden]` float64 of a norm, which is then x / rms(x) alone."""
        ones = torch.ones(self.sites.hidden, dtype=torch.float64, device=self.model.device)
        gain = ones if module.weight is None else module.weight.detach().to(torch.float64, copy=True)
        bias = getattr(module, "bias", None)
        shift = None if bias is None else bias.detach().to(torch.float64, copy=True)
        self.eps[name] = float(getattr(module, "variance_epsilon", None) or module.eps)
        steps.set_rms_norm(module, self.eps[name])
        return gain, shift

    def _residual(self) -> Tensor:
        return self.rotation.residual.to(self.model.device)

    # -- what quantize writes and reads ------------------------------------------------------------------------------

    def block_operations(self, i: int) -> list[dict[str, Any]]:
        """Of block `i`, besides those of its linears."""
        path = self.model.structure.path
        made: list[dict[str, Any]] = []
        if self.rotation.keys:
            attention = path(i, self.model.structure.attention)
            made.append({"op": "rotate_qk_after_rope", "module": attention, "block": self.rotation.keys})
        if self.rotation.heads:
            output = path(i, self.sites.output)
            made.append({"op": "heads_hadamard", "module": output, "heads": self.sites.heads, "block": self.rotation.heads})
        return made

    @property
    def norms(self) -> tuple[str, ...]:
        """Of every block."""
        return tuple(n for n, _ in self.sites.readers)

    def norm_operation(self, norm: str) -> dict[str, Any]:
        return {"kind": "rms", "eps": self.eps[norm]}

    def input_steps(self, name: str) -> list[dict[str, Any]]:
        """Steps of the linear `name`'s own operation."""
        return down_steps(self.sites, self.rotation) if name == self.sites.down else []

    def recollects(self, needs: frozenset[str]) -> str | None:
        """Why statistics of the unrotated model do not carry over; None where they do."""
        return recollects(self.sites, needs, self.maps)

    def mapped(self, i: int, found: BlockStatistics) -> BlockStatistics:
        """Statistics of the unrotated block's inputs ▸ those of the rotated block's. Raises InputError where a norm has a
        zero in its scale: what it hides cannot be known."""
        return BlockStatistics({n: s.mapped(self._input_map(i, n)) for n, s in found.sites.items()}, found.tokens)

    def _input_map(self, i: int, site: str) -> Callable[[Tensor], Tensor]:
        sites, rotation = self.sites, self.rotation
        for norm, readers in sites.readers:
            if site in readers:
                gain, residual = self.gains[i, norm], self._residual()
                if not bool((gain != 0).all()):
                    raise InputError(
                        f"{self.model.structure.path(i, norm)} has {int((gain == 0).sum())} zeros in its scale, so that statistics of the "
                        "unrotated model do not carry over; use propagation=quantized, which collects them in the rotated model"
                    )
                return lambda x: (x / gain) @ residual
        if site == sites.down:
            return lambda x: mix(x, rotation.down)
        value = rotation.values[i].to(self.model.device)
        return lambda x: steps.mix_heads((torch.unflatten(x, -1, (-1, sites.head_dim)) @ value).flatten(-2), sites.heads, rotation.heads)


def down_steps(sites: Rotatable, rotation: Rotation) -> list[dict[str, Any]]:
    return [{"op": "hadamard", "size": sites.inner, "block": rotation.down}] if rotation.down else []


def set_block_steps(block: nn.Module, structure: Structure, sites: Rotatable, rotation: Rotation) -> None:
    """As the recipe's operations do."""
    if rotation.heads:
        mixed = steps.Step(lambda x: steps.mix_heads(x, sites.heads, rotation.heads))
        steps.set_steps(block.get_submodule(sites.output), "heads", [mixed])
    steps.set_linear_steps(linear_view(block, sites.down), down_steps(sites, rotation), {})
    if rotation.keys:
        steps.set_key_rotation(block.get_submodule(structure.attention), rotation.keys)


def write(block: nn.Module, made: Weights, prefix: str) -> None:
    """Raises NumericalError for a value that the model's dtype cannot hold."""
    for name, weight in made.weight.items():
        view = linear_view(block, name)
        view.write(weight)
        check_held(view.storage, f"{prefix}{name}.weight", ROTATED)
        if name in made.bias:
            steps.write_bias(view.module, made.bias[name])
            check_held(view.bias, f"{prefix}{name}.bias", ROTATED)


def model_shape(sites: Rotatable, blocks: int) -> ModelShape:
    return ModelShape(sites.hidden, sites.inner, sites.heads, sites.head_dim, blocks)


def sites_of(model: BlockModel) -> Rotatable:
    """Raises UnsupportedModel for a model whose stream cannot be rotated."""
    return rotatable(model.checkpoint.config)
