"""What stored formats have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from quant.accounting import bits_stored

T = TypeVar("T", bound="Stored")


@dataclass(frozen=True)
class Stored(ABC):
    """A weight `[N, K]`, and what its columns were multiplied by before it was quantized."""

    input_scale: Tensor | None = field(default=None, kw_only=True)
    """float16 or float32 `[K]`; None where nothing was multiplied, or where something before divides by it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype:
        """Type of the scales; an input scale is kept in it where that changes no value."""

    @abstractmethod
    def pack(self) -> dict[str, Tensor]: ...

    @property
    def bits_stored(self) -> float:
        return bits_stored(self.pack(), math.prod(self.shape))

    def with_input_scale(self: T, scale: Tensor) -> T:
        """The same codes standing for the weight before its columns were multiplied by `scale` `[K]`, besides what they were multiplied
        by before. Kept like the scales where that changes no value, else in float32."""
        whole = scale.float() if self.input_scale is None else scale.float() * self.input_scale.float()
        narrow = whole.to(self.scale_dtype)
        return replace(self, input_scale=narrow if torch.equal(narrow.float(), whole) else whole)

    def unscaled(self, weight: Tensor) -> Tensor:
        """`[N, K]` as the codes have it ▸ as it was before its columns were multiplied."""
        return weight if self.input_scale is None else weight / self.input_scale.to(weight.dtype)

    def with_scale(self, payload: dict[str, Tensor]) -> dict[str, Tensor]:
        """`payload`, with the input scale where there is one."""
        return payload if self.input_scale is None else {**payload, "input_scale": self.input_scale}


@dataclass(frozen=True)
class Coded(Stored):
    """With one code per weight."""

    codes: Tensor
    """uint8 `[N, K]`."""

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k
