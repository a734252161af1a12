"""The numeric format of a variant: weight, activation and KV-cache parts.

Standard library only: planning, workers and the quantization code share these types. `None` for a part
means that it stays in the model's own floating-point format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
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
class Number:
    """A number format: what `quant.number_formats` must keep to, as far as planning needs it."""

    bits: int | None
    """Bits of one code; None: as many as the scheme says."""
    label: str
    """Behind the bits in names of schemes: `w4nf`."""
    block: int | None = None
    """Values that share a scale, where the format fixes it."""
    grouped: bool = False
    """Only in groups, whatever their size."""
    activations: bool = True


NUMBERS: dict[str, Number] = {
    "int": Number(None, ""),
    "fp8_e4m3": Number(8, "fp"),
    "fp8_e5m2": Number(8, "e5m2"),
    "mxfp8": Number(8, "mx", block=32),
    "mxfp4": Number(4, "mx", block=32),
    "nvfp4": Number(4, "nv", block=16),
    "nf4": Number(4, "nf", grouped=True, activations=False),
    "nf4_dq": Number(4, "nfdq", grouped=True, activations=False),
}
"""Integers and what `quant.number_formats` describes."""
ANY_NUMBER = ("any",)
"""Of `Supports.numbers`: all of them."""


def _check_number(part: str, number: str, bits: int, symmetric: bool) -> Number:
    if number not in NUMBERS:
        raise ValueError(f"{part}.number={number} is unknown; choose one of {', '.join(NUMBERS)}")
    format = NUMBERS[number]
    if format.bits is not None and format.bits != bits:
        raise ValueError(f"{part}.number={number} has {format.bits} bits; {part}.bits={bits} was given")
    if number != "int" and not symmetric:
        raise ValueError(f"{part}.number={number} has a sign and no zero point; set {part}.symmetric=true")
    return format


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
    number: str = "int"
    """A name of `NUMBERS`. The scales of mxfp4, mxfp8, nvfp4 and nf4_dq have types of their own."""

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
        format = _check_number("weight", self.number, self.bits, self.symmetric)
        if format.block is not None and self.group_size != format.block:
            raise ValueError(
                f"weight.number={self.number} has one scale per {format.block} inputs; set granularity=group, group_size={format.block}"
            )
        if format.grouped and self.group_size is None:
            raise ValueError(f"weight.number={self.number} works in groups; set granularity=group and a group_size (64 is usual)")


@dataclass(frozen=True)
class Supports:
    """Which weight schemes and models a transform or rounding works on. Planning reads the same facts from yaml."""

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    granularity: tuple[str, ...] = ("tensor", "channel", "group")
    ragged_groups: bool = False
    """Works where the group size does not divide the inputs: the last group is smaller, or it has no groups."""
    inputs_together: int = 1
    """Consecutive inputs that have one code; their number must divide the inputs, whatever the groups are."""
    families: tuple[str, ...] | None = None
    """Model types of config.json; None for all that bitgrid knows."""
    numbers: tuple[str, ...] = ("int",)
    """Number formats; `any` for all of them."""

    def refuses(self, name: str, scheme: WeightScheme, family: str | None = None) -> str | None:
        """Why the method `name` cannot make `scheme`, with what it can; None where it can."""
        if scheme.bits not in self.bits:
            return f"{name} does not make weight.bits={scheme.bits}; it makes {', '.join(map(str, self.bits))}"
        if self.numbers != ANY_NUMBER and scheme.number not in self.numbers:
            return f"{name} does not make weight.number={scheme.number}; it makes {', '.join(self.numbers)}"
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
    number: str = "int"
    """A name of `NUMBERS`."""
    outlier_threshold: float | None = None
    """Inputs that reach it anywhere in a sequence stay in 16 bits (LLM.int8(): 6.0); None for no such inputs."""
    outlier_version: int = 1
    """Of that rule, for keys: 1 took the tokens of a batch that reach a linear without their sequences (OPT, experts) for one sequence."""
    steps_version: int = 1
    """Of `by_sequence` with a cache that is written step by step, for keys: 1 gave a step as many tokens as a batch had room for."""
    number_version: int = 1
    """Of mxfp4 and mxfp8, for keys: 1 took an infinite input for a finite one."""

    @property
    def by_sequence(self) -> bool:
        """Whether what becomes of a token goes by the tokens of its sequence that come with it."""
        return self.dynamic and (self.granularity is Granularity.TENSOR or self.outlier_threshold is not None)

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
        format = _check_number("activation", self.number, self.bits, self.symmetric)
        if not format.activations:
            raise ValueError(
                f"activation.number={self.number} is for weights; choose {', '.join(n for n, f in NUMBERS.items() if f.activations)}"
            )
        if format.block is not None and self.granularity is not Granularity.TOKEN:
            raise ValueError(
                f"activation.number={self.number} has a scale per {format.block} inputs of a token; set activation.granularity=token"
            )
        if self.outlier_threshold is not None and not (0 < self.outlier_threshold < math.inf and self.granularity is Granularity.TOKEN):
            raise ValueError(
                f"activation.outlier_threshold={self.outlier_threshold} must be positive and finite, and activation.granularity token; "
                "null for none"
            )
        if self.number != "int" and self.clip != 1:
            raise ValueError(f"activation.clip={self.clip} is for integers; with activation.number={self.number} use 1.0")


KV_KINDS = {"per_token": (2, 8), "kivi": (2, 8), "kvquant": (2, 5)}
"""Quantizers of the cache, and their least and most bits."""
KV_MODES = ("simulate", "decode")
KV_CODEBOOKS = ("uniform", "nuq")


@dataclass(frozen=True)
class KVScheme:
    """Format of the keys and values that attention reads, and how an evaluation gets there."""

    bits: int
    symmetric: bool = False
    """per_token only."""
    group_size: int | None = None
    """Consecutive channels of a head that share a scale (kivi: and tokens of a key channel); None, for per_token, is one scale per
    token and head."""
    kind: str = "per_token"
    """per_token: every token on its own range; kivi: keys per channel, values per token, the latest tokens in full precision;
    kvquant: keys per channel before the rotary embedding, codebooks, outliers kept."""
    version: int = 1
    """Of the kind's code."""
    mode: str = "simulate"
    """simulate: one forward pass, the cache's effect computed in it; decode: the cache is written and read step by step, with the
    text's own tokens as input."""
    prefill: int = 1
    """kivi: tokens at the start of a window that form the prompt and read themselves in full precision."""
    value_bits: int | None = None
    """kivi: bits of values where they differ from the keys'."""
    residual_length: int | None = None
    """kivi: tokens in full precision, a multiple of the group size."""
    outliers: float = 0.0
    """kvquant: share of values kept exactly."""
    codebook: str = "uniform"
    """kvquant: uniform, or nuq (k-means on calibration data)."""
    first_few_fp16: int = 0
    """kvquant: tokens at the start kept exactly, and left out of calibration."""
    first_few_version: int = 1
    """Of `first_few_fp16`, for keys: 1 calibrated on those tokens, too."""
    fisher: bool = False
    """kvquant, nuq: k-means weighted by the squared gradient of the loss (needs a backward pass while calibrating)."""
    clip: float = 1.0
    """per_token: share of the range that is kept; QuaRot's tables use 0.95."""

    def __post_init__(self) -> None:
        if self.kind not in KV_KINDS:
            raise ValueError(f"kv.kind={self.kind}; choose {', '.join(KV_KINDS)}")
        if self.mode not in KV_MODES:
            raise ValueError(f"kv.mode={self.mode}; choose {' or '.join(KV_MODES)}")
        least, most = KV_KINDS[self.kind]
        for name, bits in (("bits", self.bits), ("value_bits", self.value_bits)):
            if bits is not None and not least <= bits <= most:
                raise ValueError(f"kv.{name}={bits} is not between {least} and {most}; leave `kv: null` for 16 bits")
        self._check_foreign()
        _check_clip("kv", self.clip)
        if self.kind == "kivi":
            size, length = self.group_size, self.residual_length
            if size is None or length is None or size < 1 or length < 1 or length % size:
                raise ValueError(f"kv.group_size={size} and kv.residual_length={length}: kivi needs the first to divide the second")
            if self.prefill < 1:
                raise ValueError(f"kv.prefill={self.prefill}; a prompt has one token at least")
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"kv.outliers={self.outliers}; give a share from 0 to below 0.5, such as 0.01")
        if self.codebook not in KV_CODEBOOKS:
            raise ValueError(f"kv.codebook={self.codebook}; choose {' or '.join(KV_CODEBOOKS)}")
        if self.first_few_fp16 < 0:
            raise ValueError(f"kv.first_few_fp16={self.first_few_fp16} must not be negative")
        if self.fisher and self.codebook != "nuq":
            raise ValueError(f"kv.fisher=true weights the k-means of kv.codebook=nuq; kv.codebook={self.codebook} has none")

    def _check_foreign(self) -> None:
        """A field of another kind would change the key and nothing else."""
        owners = {
            "symmetric": ("per_token",),
            "clip": ("per_token",),
            "group_size": ("per_token", "kivi"),
            "prefill": ("kivi",),
            "value_bits": ("kivi",),
            "residual_length": ("kivi",),
            "outliers": ("kvquant",),
            "codebook": ("kvquant",),
            "first_few_fp16": ("kvquant",),
            "fisher": ("kvquant",),
        }
        for f in fields(self):
            if f.name in owners and self.kind not in owners[f.name] and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"kv.{f.name}={getattr(self, f.name)} means nothing to kv.kind={self.kind}; it is for {', '.join(owners[f.name])}"
                )

    @property
    def statistics(self) -> tuple[str, ...]:
        """Of calibration text, that an evaluation needs: kv (keys and values), kv_fisher (their weights)."""
        if self.kind != "kvquant":
            return ()
        return ("kv", "kv_fisher") if self.fisher else ("kv",)


def _check_clip(part: str, clip: float) -> None:
    if not 0 < clip <= 1:
        raise ValueError(f"{part}.clip={clip} is not a share of the range; give more than 0 and at most 1")


@dataclass(frozen=True)
class Scheme:
    """All parts of a variant's format."""

    weight: WeightScheme | None = None
    activation: ActivationScheme | None = None
    kv: KVScheme | None = None
