"""Protocols of quantization methods.

A method is ordered transforms, then one rounding. Both work on tensors: no model, hook, device or file is known here.
Shapes: weight `[N, K]` (out, in), statistics of the input with K channels, samples `[S, T, K]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from quant.reassembly import Reassembly
from quant.scheme import ActivationScheme, Supports, WeightScheme
from quant.statistics import Statistics


class StoredTensor(Protocol):
    """A quantized weight in one of the stored formats (`quant.tensors`)."""

    format: ClassVar[str]
    """Name of the stored format, as written in recipes."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    def bits_nominal(self) -> float:
        """The paper's label: bits per weight of the codes."""

    @property
    def bits_stored(self) -> float:
        """8 x bytes of every payload tensor / (N K)."""

    def dequantize(self) -> Tensor:
        """The weight `[N, K]` it stands for, float32; approximates the weight that was given to `quantize`."""

    def pack(self) -> dict[str, Tensor]:
        """Payload tensors by short name; with `meta()` enough to rebuild bit-exactly."""

    def meta(self) -> dict[str, Any]:
        """JSON parameters for `unpack`."""

    def with_input_scale(self, scale: Tensor) -> StoredTensor:
        """The same codes standing for the weight before its columns were multiplied by `scale` `[K]`."""


def working_dtype(weight: Tensor) -> torch.dtype:
    """In which a weight is computed: float64 where it has that, float32 for all else."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32


@dataclass
class Rounded:
    """What a rounding returns."""

    tensor: StoredTensor
    damp: float | None = None
    """Damping that was used, as a fraction of mean(diag H); None where there is no Hessian."""
    notes: list[str] = field(default_factory=list)
    """Every fallback taken, in words."""
    details: dict[str, Any] = field(default_factory=dict)
    """JSON facts for the record that only this method has: bits per group, share of outliers, entropy of a mask."""


@dataclass(frozen=True)
class Linear:
    """What a rounding may know of a linear besides its weight and statistics."""

    name: str = "weight"
    """Full module path."""
    seed: int = 0
    """Of the stage; zero for methods that do not declare uses_seed."""
    bias: Tensor | None = None
    """`[N]`."""

    def generator(self) -> torch.Generator:
        """On the CPU, of this linear alone: results do not depend on the order of linears."""
        digest = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


ANY = Linear()


class Declared(Protocol):
    """What every part of a method says of itself; the yaml of an option says the same."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[frozenset[str]]
    """Statistics that must be given: hessian, absmax, absmean, minmax, samples."""
    reads: ClassVar[frozenset[str]]
    """Run-time parts of the scheme that change the result: activation, kv; and text, where a search is fed calibration text."""
    uses_seed: ClassVar[bool]
    supports: ClassVar[Supports]


class Rounding(Declared, Protocol):
    """weight, statistics, scheme ▸ stored tensor. The weight is never changed."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded: ...


@runtime_checkable
class Stacks(Protocol):
    """A rounding that takes linears which read one input in one call, with the results that `quantize` has, bit for bit."""

    def stacks(self, weights: Sequence[Tensor], schemes: Sequence[WeightScheme]) -> bool:
        """Whether it takes these weights `[N_i, K]` together."""

    def quantize_stacked(self, weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[WeightScheme]) -> list[Rounded]:
        """Of weights that `stacks` takes. Raises as `quantize` does, and ScaleDtypeError where one needs wider scales than its scheme's:
        alone, the first says which linear it is, and the second is a note."""


@dataclass
class ScaleGroup:
    """Linears that read one input, the operation that produces it, and a way to see the effect of changed weights."""

    name: str
    producer_kind: str
    """norm (weight and bias are divided by s), linear (its last s.numel() output rows and bias are), or none."""
    consumers: dict[str, Tensor]
    """Name ▸ weight `[N, K]`, all with the same K; not to be changed in place."""
    statistics: Statistics
    """Of the consumers' shared input."""
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """(weights of the consumers, inputs `[S, T, K]`) ▸ output of the module that reads the input (the attention or
    feed-forward module, or the linear itself)."""
    routers: dict[str, Tensor] = field(default_factory=dict)
    """Name ▸ weight `[*, K]` that reads the same input and is scaled along, but never quantized."""
    linear: bool = False
    """The module is the one consumer itself: forward(w, x) = x wᵀ, so that xᵀx says all about a change of w."""
    activation: ActivationScheme | None = None
    """How inputs are quantized at run time: for transforms that declare they read it."""
    schemes: Mapping[str, WeightScheme] = field(default_factory=dict)
    """Of consumers whose format is another than that which a transform is called with."""


class Transform(Declared, Protocol):
    """A rewrite of groups of linears before rounding. A search that rounds the consumers looks at `group.schemes`, too."""

    for_activations: ClassVar[bool]
    """It only helps quantized activations; without them it runs, flagged as idle."""

    def scale(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """s `[K]` > 0: consumers' columns are multiplied, the producer's output divided by it (function-preserving);
        None to leave the group alone."""

    def rewrite(self, name: str, weight: Tensor, statistics: Statistics, scheme: WeightScheme) -> Tensor | None:
        """A changed weight `[N, K]` (clipping, for example), after all scales of the block; None for no change."""


@dataclass
class InputGroup:
    """Linears that read one input, and what they compute together."""

    name: str
    consumers: dict[str, Tensor]
    """Name ▸ weight `[N, K]`, all with the same K; not to be changed in place."""
    statistics: Statistics
    """Of the consumers' shared input."""
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """(weights of the consumers, inputs `[S, T, K]`) ▸ `[S, T, *]`: what the next linear of the block reads (what attention makes of
    queries, keys and values; the product of gate and up), or the output of the one consumer that no function follows."""
    schemes: Mapping[str, WeightScheme] = field(default_factory=dict)
    """As of `ScaleGroup`."""


@dataclass
class Reassembled:
    """What an input transform found for one group."""

    map: Reassembly | None
    """None: the input stays as it is."""
    details: dict[str, Any] = field(default_factory=dict)
    """JSON facts for the record."""
    reason: str | None = None
    """Why there is no map."""


class InputTransform(Transform, Protocol):
    """A transform that changes linears' inputs at run time. `scale` and `rewrite` give None."""

    def reassemble(self, group: InputGroup, scheme: WeightScheme, activation: ActivationScheme | None) -> Reassembled:
        """activation: the scheme's part, with static ranges taken as dynamic ones."""


@dataclass(frozen=True)
class ModelShape:
    """Widths that rotations of a whole model act on."""

    hidden: int
    """Channels of the residual stream."""
    inner: int
    """Inputs of the feed-forward module's second linear."""
    heads: int
    """Query heads."""
    head_dim: int
    blocks: int


@dataclass
class Rotation:
    """Orthonormal changes of basis of a whole model; row vectors, x ▸ x R. Known before the first block is read."""

    residual: Tensor
    """`[hidden, hidden]` float64: of the residual stream, folded into every weight that reads or writes it."""
    values: tuple[Tensor, ...]
    """Per block `[head_dim, head_dim]` float64: of every head's values, folded into value and output projections."""
    heads: int = 0
    """Consecutive heads that one Hadamard matrix mixes before the output projection, at run time; 0: none."""
    down: int = 0
    """Consecutive inputs that one Hadamard matrix mixes before the second feed-forward linear, at run time; 0: none."""
    keys: int = 0
    """Channels of a head that one Hadamard matrix mixes, in queries and keys after RoPE; 0: none."""
    notes: list[str] = field(default_factory=list)
    """Every fallback taken, in words."""
    details: dict[str, Any] = field(default_factory=dict)
    """JSON facts for the record: losses of a search."""


RotationLoss = Callable[[Rotation, int], Tensor]
"""(rotation in any float type, number of a sequence, taken modulo their count) ▸ the quantized model's mean loss, with a graph."""


class ModelTransform(Declared, Protocol):
    """A rewrite of embeddings, all blocks and head together; the first transform of a method, the same for all linears.

    Norms are fused into the linears behind them first (in float64), so that rotations pass through them."""

    for_activations: ClassVar[bool]
    maps: ClassVar[frozenset[str]]
    """Statistics of the unrotated model that carry over exactly (where norms have no bias); others are recollected."""
    working_set: ClassVar[str]
    """block (the rotation is fixed before the walk) or model."""
    searches: ClassVar[bool]
    """`rotation` needs a loss."""

    def rotation(self, shape: ModelShape, generator: torch.Generator, loss: RotationLoss | None = None) -> Rotation: ...


@runtime_checkable
class Shifts(Protocol):
    """A transform that also shifts inputs, before it scales them."""

    def shift(self, group: ScaleGroup, scheme: WeightScheme) -> Tensor | None:
        """z `[K]`: the input x becomes x - z, the norm's bias loses z, every consumer's bias gains W z (function-preserving);
        None for no shift. Asked only where norm and consumers have biases."""
