"""The numeric format of a variant: weight, activation and KV-cache parts.

Standard library only: planning, workers and the quantization code share these types. `None` for a part
means that it stays in the model's own floating-point format.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Granularity(str, Enum):
    """How many values share one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    """One per output channel (weights)."""
    GROUP = "group"
    """One per `group_size` consecutive inputs of an output channel (weights), or of a head (KV)."""
    TOKEN = "token"
    """One per token (activations, KV)."""


@dataclass(frozen=True)
class WeightScheme:
    """Format of the weights `[N, K]`."""

    bits: int
    symmetric: bool = False
    granularity: Granularity = Granularity.CHANNEL
    group_size: int | None = None
    """Inputs per group when `granularity` is group; must divide K."""
    scale_dtype: str = "float16"
    """Stored type of scales and of non-integer zeros: float16 or float32. Codes are chosen for the stored value."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"weight.bits={self.bits} is not between 1 and 8; leave `weight: null` for unquantized weights")
        if (self.granularity is Granularity.GROUP) != (self.group_size is not None):
            raise ValueError(
                f"weight.granularity={self.granularity.value} with group_size={self.group_size}: "
                "give a group_size with granularity 'group', and none otherwise"
            )
        if self.granularity is Granularity.TOKEN:
            raise ValueError("weight.granularity=token is for activations; choose tensor, channel or group")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"weight.group_size={self.group_size} must be positive")
        if self.scale_dtype not in ("float16", "float32"):
            raise ValueError(f"weight.scale_dtype={self.scale_dtype}; choose float16 or float32")


@dataclass(frozen=True)
class Supports:
    """Which weight schemes and models a transform or rounding works on. Planning reads the same facts from yaml."""

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    granularity: tuple[str, ...] = ("tensor", "channel", "group")
    ragged_groups: bool = False
    """Works where the group size does not divide the inputs: the last group is smaller."""
    families: tuple[str, ...] | None = None
    """Model types of config.json; None for all that bitgrid knows."""

    def refuses(self, name: str, scheme: WeightScheme, family: str | None = None) -> str | None:
        """Why the method `name` cannot make `scheme`, with what it can; None where it can."""
        if scheme.bits not in self.bits:
            return f"{name} does not make weight.bits={scheme.bits}; it makes {', '.join(map(str, self.bits))}"
        if scheme.granularity.value not in self.granularity:
            return f"{name} does not work with weight.granularity={scheme.granularity.value}; it works with {', '.join(self.granularity)}"
        if family is not None and self.families is not None and family not in self.families:
            return f"{name} does not know the blocks of model_type {family!r}; it works on {', '.join(self.families)}"
        return None


@dataclass(frozen=True)
class ActivationScheme:
    """Format of the inputs `[M, K]` of every quantized linear, fake-quantized at run time."""

    bits: int
    symmetric: bool = True
    granularity: Granularity = Granularity.TOKEN
    dynamic: bool = True
    """Ranges taken from the tensor at hand; otherwise from calibration, on the quantized model."""
    clip: float = 1.0
    """Share of a dynamic range that is kept; QuaRot's tables use 0.9."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"activation.bits={self.bits} is not between 2 and 8; leave `activation: null` for 16 bits")
        if self.granularity not in (Granularity.TOKEN, Granularity.TENSOR):
            raise ValueError(f"activation.granularity={self.granularity.value}; choose token or tensor")
        if not self.dynamic and self.granularity is Granularity.TOKEN:
            raise ValueError("static activation ranges exist per tensor only; set activation.granularity=tensor or dynamic=true")
        _check_clip("activation", self.clip)
        if not self.dynamic and self.clip != 1:
            raise ValueError(f"activation.clip={self.clip} is for dynamic ranges; static ones are those of calibration: use 1.0")


@dataclass(frozen=True)
class KVScheme:
    """Format of keys and values, fake-quantized on every token in the single forward pass (labelled simulation)."""

    bits: int
    symmetric: bool = False
    group_size: int | None = None
    """Consecutive channels of a head that share a scale; `None` is one scale per token and head."""
    clip: float = 1.0
    """Share of the range that is kept; QuaRot's tables use 0.95."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"kv.bits={self.bits} is not between 2 and 8; leave `kv: null` for 16 bits")
        _check_clip("kv", self.clip)


def _check_clip(part: str, clip: float) -> None:
    if not 0 < clip <= 1:
        raise ValueError(f"{part}.clip={clip} is not a share of the range; give more than 0 and at most 1")


@dataclass(frozen=True)
class Scheme:
    weight: WeightScheme | None = None
    activation: ActivationScheme | None = None
    kv: KVScheme | None = None
